// Memory for large CPU results. The page faults of a fresh 64 MB tensor cost ten times the decoding that fills it: so
// the one most recently freed, up to 128 MiB, is kept for the next result of about its size.
#pragma once
#include <cstdint>

namespace pyqlora::cpu {

class OutputMemory {
  public:
    explicit OutputMemory(int64_t bytes);  // RuntimeError where there is no memory
    ~OutputMemory();
    OutputMemory(const OutputMemory&) = delete;
    OutputMemory& operator=(const OutputMemory&) = delete;

    void* data() const { return data_; }
    int64_t bytes() const { return bytes_; }

  private:
    void* data_;
    int64_t bytes_;     // asked for
    int64_t capacity_;  // mapped
};

}  // namespace pyqlora::cpu
