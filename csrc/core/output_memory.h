// Memory for large CPU results, outside of the heap. Fresh memory costs page faults, for 64 MB ten times the decoding
// that fills it, and a heap's gaps between tensors and small objects are lost to tensors of the same sizes: so what is
// freed stays for the next result of about its size, as long as all of it together is no more than was in use at once.
// Of idle memory 128 MiB are held on to; the kernel may take the rest whenever it runs short.
//
// Its users hold Python's lock, except while memory is mapped: no lock of its own is held across a fork.
#pragma once
#include <cstdint>
#include <memory>

namespace pyqlora::cpu {

class OutputMemory {
  public:
    // What was freed; null where nothing fits, and then with room for what the constructor maps.
    static std::unique_ptr<OutputMemory> reuse(int64_t bytes);
    explicit OutputMemory(int64_t bytes);  // new to the process; RuntimeError where there is no memory
    void count();                          // as in use: the first call after either of the above
    ~OutputMemory();
    OutputMemory(const OutputMemory&) = delete;
    OutputMemory& operator=(const OutputMemory&) = delete;

    void* data() const { return data_; }
    int64_t bytes() const { return bytes_; }

  private:
    OutputMemory(void* data, int64_t bytes, int64_t capacity) : data_(data), bytes_(bytes), capacity_(capacity) {}

    void* data_;
    int64_t bytes_;     // asked for
    int64_t capacity_;  // mapped
};

}  // namespace pyqlora::cpu
