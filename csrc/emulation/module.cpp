// The extension module of an emulation build: the CUDA operations under `cuda`, and the device itself.
#include <pybind11/pybind11.h>

#include "counts.h"
#include "cuda_runtime.h"
#include "ops/bind.h"
#include "probes.h"

namespace py = pybind11;
using namespace py::literals;

PYBIND11_MODULE(pyqlora_emulation, m) {
    py::module_ cpu = m.def_submodule("cpu"), cuda = m.def_submodule("cuda", "CUDA kernels on emulated device memory.");
    pyqlora::bind_operations(cpu, cuda);

    m.def(
        "malloc",
        [](size_t bytes, int device) {
            void* p = emulation::allocate(bytes, device);
            if (!p) throw std::bad_alloc();
            return reinterpret_cast<uintptr_t>(p);
        },
        "bytes"_a, "device"_a = 0, "Device memory, uninitialised.");
    m.def(
        "free",
        [](uintptr_t p) {
            if (!emulation::release(reinterpret_cast<void*>(p))) throw py::value_error("free: not an allocation");
        },
        "pointer"_a);
    m.def(
        "written_by_host",
        [](uintptr_t p, size_t bytes) { emulation::checks::written_by_host(reinterpret_cast<void*>(p), bytes); },
        "pointer"_a, "bytes"_a, "These bytes are initialised.");
    m.def("set_device_count", &emulation::set_device_count, "count"_a,
          "How many there are; the first becomes current.");
    m.def("current_device", &emulation::current_device);
    m.def("set_compute_capability", &emulation::set_compute_capability, "major"_a, "What the device says of itself.");
    m.def("set_lazy", &emulation::set_lazy, "seed"_a,
          "Queue what streams are given and run it in a random legal order when someone waits; 0: run it at once.");
    m.def("set_concurrent_managed_access", &emulation::set_concurrent_managed_access, "supported"_a);
    m.def(
        "synchronize", [](uintptr_t stream) { cudaStreamSynchronize(reinterpret_cast<cudaStream_t>(stream)); },
        "stream"_a = 0);
    m.def(
        "copy",
        [](uintptr_t to, uintptr_t from, size_t bytes, uintptr_t stream) {
            cudaMemcpyAsync(reinterpret_cast<void*>(to), reinterpret_cast<const void*>(from), bytes,
                            cudaMemcpyHostToDevice, reinterpret_cast<cudaStream_t>(stream));
        },
        "to"_a, "from"_a, "bytes"_a, "stream"_a);
    m.def(
        "new_stream",
        [] {
            cudaStream_t stream;
            cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
            return reinterpret_cast<uintptr_t>(stream);
        },
        "A cudaStream_t, for the life of the process.");
    m.def(
        "begin_capture", [](uintptr_t stream) { emulation::begin_capture(reinterpret_cast<cudaStream_t>(stream)); },
        "stream"_a, "Keep what this stream is given as a graph instead of running it.");
    m.def("end_capture", &emulation::end_capture);
    m.def("replay", &emulation::replay, "Run the graph; False if it failed.");
    m.def(
        "stream_counts",
        [] {
            const emulation::StreamCounts c = emulation::stream_counts();
            return py::dict("host_accesses"_a = c.host_accesses, "page_faults"_a = c.page_faults,
                            "prefetches"_a = c.prefetches, "page_outs"_a = c.page_outs, "copies"_a = c.copies,
                            "allocations"_a = c.allocations);
        },
        "What happened since the last set_lazy.");
    m.def("reset", &emulation::reset, "Forget the last failure, after which every launch fails.");
    m.def(
        "set_order",
        [](const std::string& order, uint64_t seed) {
            using emulation::Order;
            if (order != "forward" && order != "reverse" && order != "random")
                throw py::value_error("set_order: expected forward, reverse or random, got " + order);
            emulation::set_order(order == "forward"   ? Order::forward
                                 : order == "reverse" ? Order::reverse
                                                      : Order::random,
                                 seed);
        },
        "order"_a, "seed"_a = 1, "In which order the threads run between barriers.");
    m.def(
        "set_copies",
        [](const std::string& when) {
            if (when != "late" && when != "early")
                throw py::value_error("set_copies: expected late or early, got " + when);
            emulation::set_copies(when == "late" ? emulation::Copies::late : emulation::Copies::early);
        },
        "when"_a, "When cp.async moves its bytes: at the wait, or at once.");
    m.def("start_counting", &emulation::counts::start, "Count how the accesses of the following launches fall.");
    m.def(
        "stop_counting",
        [] {
            py::list totals;
            for (const auto& t : emulation::counts::stop())
                totals.append(py::make_tuple(t.shared ? "shared" : "device", t.write ? "store" : "load", t.bytes,
                                             t.requests, t.taken, t.ideal));
            return totals;
        },
        "Of each instruction in each block: (space, kind, bytes a lane, requests, wavefronts or sectors, ideally).");
    m.def(
        "probe",
        [](const std::string& name, int misuse, uintptr_t in, uintptr_t out) {
            pyqlora::cuda::probe(name, misuse, reinterpret_cast<const int*>(in), reinterpret_cast<int*>(out), nullptr);
        },
        "name"_a, "misuse"_a, "input"_a, "output"_a, "Run a kernel of probes.cu.");
    m.attr("PROBE_INTS") = pyqlora::cuda::kProbeInts;
}
