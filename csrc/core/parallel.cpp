#include "core/parallel.h"

#include <dlfcn.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace pyqlora::cpu {
namespace {

// One parallel_for in progress. Ranges are handed out dynamically, so a descheduled thread delays only its own.
struct Job {
    Job(const std::function<void(int64_t, int64_t)>& body, int64_t count, int64_t step)
        : body(body), count(count), step(step) {}

    const std::function<void(int64_t, int64_t)>& body;
    int64_t count, step;
    std::atomic<int64_t> next{0};
    int helpers = 0;  // threads that may still join; guarded by the pool's mutex
    int running = 0;  // threads inside; guarded by the pool's mutex
    std::exception_ptr error;
    std::mutex error_mutex;

    void work() {
        for (int64_t begin; (begin = next.fetch_add(step)) < count;) {
            try {
                body(begin, std::min(begin + step, count));
            } catch (...) {
                std::lock_guard lock(error_mutex);
                if (!error) error = std::current_exception();
                next.store(count);
            }
        }
    }
};

// What a parallel region of OpenMP calls, in the runtimes of GNU, LLVM and Intel alike: the one that torch loaded, so
// that its threads are ours. Null where torch has none.
using Team = void (*)(void (*work)(void*), void* argument, unsigned threads, unsigned flags);

Team openmp_team() {
    static void* const team = [] {
        void* found = dlsym(RTLD_DEFAULT, "GOMP_parallel");
        void* torch = found ? nullptr : dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
        return torch ? dlsym(torch, "GOMP_parallel") : found;
    }();
    return reinterpret_cast<Team>(team);
}

// In a process forked from one that had loaded this library: torch's threads may be gone, and waiting for them endless.
bool forked = false;
[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, [] { forked = true; });

// Threads of our own, which block between jobs.
class Pool {
  public:
    static Pool& get() {
        static Pool* pool = [] {
            // A forked child has none of the parent's threads: it starts with a pool of its own.
            pthread_atfork(nullptr, nullptr, [] { instance = new Pool; });
            return instance = new Pool;
        }();
        (void)pool;
        return *instance;
    }

    void run(Job& job, int helpers) {
        std::unique_lock lock(mutex_);
        while (size_ < helpers) {
            std::thread([this] { loop(); }).detach();
            ++size_;
        }
        job.helpers = helpers;
        jobs_.push_back(&job);
        lock.unlock();
        for (int i = 0; i < helpers; ++i) wake_.notify_one();
        job.work();
        lock.lock();
        jobs_.erase(std::remove(jobs_.begin(), jobs_.end(), &job), jobs_.end());
        done_.wait(lock, [&] { return job.running == 0; });
    }

  private:
    void loop() {
        std::unique_lock lock(mutex_);
        for (;;) {
            wake_.wait(lock, [&] { return !jobs_.empty(); });
            Job* job = jobs_.front();
            if (--job->helpers == 0) jobs_.erase(jobs_.begin());
            ++job->running;
            lock.unlock();
            job->work();
            lock.lock();
            if (--job->running == 0) done_.notify_all();
        }
    }

    inline static Pool* instance = nullptr;
    std::mutex mutex_;
    std::condition_variable wake_, done_;
    std::vector<Job*> jobs_;
    int size_ = 0;
};

}  // namespace

void parallel_for(int threads, int64_t count, int64_t grain, const std::function<void(int64_t, int64_t)>& body) {
    if (count <= 0) return;
    const int64_t grains = (count + grain - 1) / grain;
    const int64_t workers = std::min<int64_t>(std::max(threads, 1), grains);
    if (workers == 1) return body(0, count);
    // About four ranges a thread: enough to even out, few enough to stay cheap.
    const int64_t step = std::max<int64_t>(1, grains / (workers * 4)) * grain;
    Job job(body, count, step);
    const Team team = openmp_team();
    if (team && !forked) {
        // All of torch's threads, though there be less work: a smaller team would end the rest of them.
        team([](void* argument) { static_cast<Job*>(argument)->work(); }, &job, static_cast<unsigned>(threads), 0);
    } else {
        Pool::get().run(job, static_cast<int>(workers - 1));
    }
    if (job.error) std::rethrow_exception(job.error);
}

}  // namespace pyqlora::cpu
