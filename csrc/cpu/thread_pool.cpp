#include "cpu/thread_pool.h"

#include <pthread.h>
#include <signal.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

#include "cpu/floating_point.h"

namespace signmaml::cpu {
namespace {

using Body = std::function<void(std::int64_t, std::int64_t)>;

struct Job {
    const Body* body;
    std::int64_t items;
    int parts;

    void run_part(int part) const {
        const DefaultFloatingPoint scope;
        // Shares differ by at most one piece. Not items * part / parts, which could overflow.
        const std::int64_t share = items / parts;
        const std::int64_t longer = items % parts;  // so many parts have one piece more
        const std::int64_t begin = part * share + (part < longer ? part : longer);
        const std::int64_t end = begin + share + (part < longer ? 1 : 0);
        if (begin < end) (*body)(begin, end);
    }
};

// Keeps signals away from the threads started in its scope: Python wants them on the main thread.
class SignalsBlocked {
  public:
    SignalsBlocked() {
        sigset_t all;
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &saved_);
    }
    ~SignalsBlocked() { pthread_sigmask(SIG_SETMASK, &saved_, nullptr); }
    SignalsBlocked(const SignalsBlocked&) = delete;
    SignalsBlocked& operator=(const SignalsBlocked&) = delete;

  private:
    sigset_t saved_;
};

class ThreadPool {
  public:
    // False, with nothing done, if another caller holds the threads.
    bool try_run(const Job& job) {
        if (busy_.test_and_set(std::memory_order_acquire)) return false;
        run(job);
        busy_.clear(std::memory_order_release);
        return true;
    }

  private:
    void run(Job job) {
        std::unique_lock<std::mutex> lock(mutex_);
        start_workers(job.parts - 1);
        if (job.parts > started_ + 1) job.parts = started_ + 1;
        job_ = job;
        pending_ = job.parts - 1;
        ++generation_;
        lock.unlock();
        work_.notify_all();
        job.run_part(0);
        lock.lock();
        done_.wait(lock, [this] { return pending_ == 0; });
    }

    // The pool makes do with fewer where the system refuses a thread. Needs mutex_.
    void start_workers(int wanted) {
        const SignalsBlocked scope;
        while (started_ < wanted) {
            try {
                std::thread([this, part = started_ + 1, seen = generation_] { work(part, seen); }).detach();
            } catch (const std::system_error&) {
                return;
            }
            ++started_;
        }
    }

    void work(int part, std::uint64_t seen) {
        std::unique_lock<std::mutex> lock(mutex_);
        for (;;) {
            work_.wait(lock, [this, seen] { return generation_ != seen; });
            seen = generation_;
            if (part >= job_.parts) continue;
            const Job job = job_;
            lock.unlock();
            job.run_part(part);
            lock.lock();
            if (--pending_ == 0) done_.notify_one();
        }
    }

    std::atomic_flag busy_ = ATOMIC_FLAG_INIT;
    std::mutex mutex_;  // guards everything below
    std::condition_variable work_, done_;
    int started_ = 0;
    int pending_ = 0;
    std::uint64_t generation_ = 0;
    Job job_{};
};

// Never destroyed: its threads wait on it until the process ends. A forked child, which has none of the threads and
// perhaps a locked mutex, forgets it and makes its own.
std::atomic<ThreadPool*> current_pool{nullptr};

ThreadPool& pool() {
    static const int registered = pthread_atfork(nullptr, nullptr, [] { current_pool.store(nullptr); });
    static_cast<void>(registered);
    ThreadPool* existing = current_pool.load(std::memory_order_acquire);
    if (existing != nullptr) return *existing;
    auto* fresh = new ThreadPool;
    if (current_pool.compare_exchange_strong(existing, fresh)) return *fresh;
    delete fresh;  // another thread was faster; this one has started no workers
    return *existing;
}

}  // namespace

void parallel_for(std::int64_t items, int threads, const Body& body) {
    if (items <= 0) return;
    const int parts = items < threads ? static_cast<int>(items) : threads;
    if (parts > 1 && pool().try_run({&body, items, parts})) return;
    Job{&body, items, 1}.run_part(0);
}

}  // namespace signmaml::cpu
