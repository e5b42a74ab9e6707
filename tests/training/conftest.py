from helpers.one_thread import one_thread  # noqa: F401 (of all tests here)
