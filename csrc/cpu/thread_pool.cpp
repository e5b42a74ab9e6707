#include "cpu/thread_pool.h"

#include <pthread.h>
#include <signal.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

#include "cpu/floating_point.h"
#include "plan/math.h"

namespace signmaml::cpu {
namespace {

using Body = std::function<void(std::int64_t, std::int64_t)>;

// A loop that several threads eat up together, range by range.
class Loop {
  public:
    Loop(const Body& body, std::int64_t items, int threads)
        : body_(body),
          items_(items),
          step_(threads == 1 ? items : larger(1, items / (std::int64_t{threads} * kRangesPerThread))) {}

    // Takes ranges until none is left. Returns when the ranges it took are done.
    void help() {
        const DefaultFloatingPoint scope;
        for (;;) {
            const std::int64_t begin = next_.fetch_add(step_, std::memory_order_relaxed);
            if (begin >= items_) return;
            body_(begin, smaller(items_, begin + step_));
        }
    }

  private:
    // Small enough to let a thread that comes late take part, large enough to make taking a range cheap.
    static constexpr std::int64_t kRangesPerThread = 8;

    const Body& body_;
    const std::int64_t items_;
    const std::int64_t step_;
    std::atomic<std::int64_t> next_{0};
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

// Threads join a loop when they wake; the caller does not wait for them to wake, only for those that joined. So a call
// costs no more than doing the work alone and one notification, however busy the machine is.
class ThreadPool {
  public:
    // False, with nothing done, if another caller holds the threads.
    bool try_run(Loop& loop, int threads) {
        if (busy_.test_and_set(std::memory_order_acquire)) return false;
        open(loop, threads - 1);
        work_.notify_all();
        loop.help();
        close();
        busy_.clear(std::memory_order_release);
        return true;
    }

  private:
    void open(Loop& loop, int helpers) {
        const std::lock_guard<std::mutex> lock(mutex_);
        start_workers(helpers);
        loop_ = &loop;
        places_ = helpers;
    }

    // After this no worker knows the loop, which the caller is about to destroy.
    void close() {
        std::unique_lock<std::mutex> lock(mutex_);
        places_ = 0;
        done_.wait(lock, [this] { return helping_ == 0; });
        loop_ = nullptr;
    }

    // The pool makes do with fewer where the system refuses a thread. Needs mutex_.
    void start_workers(int wanted) {
        const SignalsBlocked scope;
        while (started_ < wanted) {
            try {
                std::thread([this] { work(); }).detach();
            } catch (const std::system_error&) {
                return;
            }
            ++started_;
        }
    }

    void work() {
        std::unique_lock<std::mutex> lock(mutex_);
        for (;;) {
            work_.wait(lock, [this] { return places_ > 0; });
            --places_;
            ++helping_;
            Loop& loop = *loop_;
            lock.unlock();
            loop.help();
            lock.lock();
            if (--helping_ == 0) done_.notify_one();
        }
    }

    std::atomic_flag busy_ = ATOMIC_FLAG_INIT;
    std::mutex mutex_;  // guards everything below
    std::condition_variable work_, done_;
    int started_ = 0;  // workers there are
    int places_ = 0;   // workers that may still join the loop
    int helping_ = 0;  // workers that joined and are not done
    Loop* loop_ = nullptr;
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
    Loop loop(body, items, static_cast<int>(larger(1, smaller(items, threads))));
    if (threads > 1 && items > 1 && pool().try_run(loop, static_cast<int>(smaller(items, threads)))) return;
    loop.help();
}

}  // namespace signmaml::cpu
