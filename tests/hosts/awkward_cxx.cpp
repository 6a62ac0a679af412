// awkward_cxx PORT: connects from constructors and destructors of static and of thread_local objects, in threads that
// end by an exception, and while an exception unwinds. Prints a letter for each.
#include "awkward.h"
#include <exception>
#include <future>
#include <stdexcept>
#include <thread>
#include <vector>

static int port;

static int port_of_environment()
{
    const char *word = getenv("AWKWARD_PORT");
    return port = word ? atoi(word) : 0;
}

struct Talker {
    const char *when;
    explicit Talker(const char *name) : when(name) {}
    ~Talker() { SAY("%s %c\n", when, talk(port)); }
};

struct Static {
    Talker talker{"static destructor"};
    Static() { SAY("static constructor %c\n", talk(port_of_environment())); }
};

static Static first;
static thread_local Talker of_thread{"thread_local destructor"};

static char talk_and_throw()
{
    Talker unwound{"while unwinding"};
    (void)of_thread.when;
    throw std::runtime_error(std::string(1, talk(port)));
}

static char caught()
{
    try {
        return talk_and_throw();
    } catch (const std::runtime_error &error) {
        return error.what()[0];
    }
}

int main()
{
    alarm(30);
    std::vector<std::thread> threads;
    std::vector<std::future<char>> results;
    for (int i = 0; i < 4; i++) {
        std::packaged_task<char()> task{talk_and_throw};
        results.push_back(task.get_future());
        threads.emplace_back(std::move(task));
    }
    for (auto &thread : threads)
        thread.join();
    for (auto &result : results)
        try {
            result.get();
        } catch (const std::exception &error) {
            SAY("carried over %s\n", error.what());
        }
    SAY("caught %c\n", caught());
    return 0;
}
