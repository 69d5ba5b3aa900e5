#include "ops/optim_step.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <string>
#include <vector>

#include "core/backend.h"
#include "core/tensor_caster.h"
#include "ops/bind.h"

namespace pyqlora {
namespace {

namespace py = pybind11;
using namespace py::literals;

// The entries of a parameter's state. The strings live as long as the process.
struct Keys {
    PyObject *step = key("step"), *unorm = key("unorm_vec");
    PyObject *state[2] = {key("state1"), key("state2")}, *absmax[2] = {key("absmax1"), key("absmax2")};
    PyObject* qmap[2] = {key("qmap1"), key("qmap2")};

  private:
    static PyObject* key(const char* name) { return PyUnicode_InternFromString(name); }
};

// Null where the state has no such entry.
py::handle find(py::handle state, PyObject* key) {
    PyObject* value = PyDict_GetItemWithError(state.ptr(), key);
    if (!value && PyErr_Occurred()) throw py::error_already_set();
    return value;
}

py::handle get(py::handle state, PyObject* key) {
    if (const py::handle value = find(state, key)) return value;
    bad_argument("optim_step", "states", "an entry " + std::string(py::repr(key)),
                 "only " + std::string(py::repr(py::list(py::reinterpret_borrow<py::object>(state)))));
}

// What one native step takes of tensors: those of one dtype with states of one width.
struct Batch {
    DType dtype;
    OptimStepArgs args;
};

// Describes tensors and keeps them alive: while the step runs, other threads may replace a gradient or a state.
struct Tensors {
    std::vector<py::object> kept;

    TensorRef operator()(py::handle tensor) {
        kept.push_back(py::reinterpret_borrow<py::object>(tensor));
        return py::cast<TensorRef>(tensor);
    }
};

int states_of(OptimRule rule) {
    int count = 0;
    dispatch_rule(rule, [&](auto tag) {
        using Rule = typename decltype(tag)::type;
        count = Rule::states > Rule::signed_states ? 2 : 1;
    });
    return count;
}

// Steps the parameters that are contiguous, with contiguous gradients, on the device of the first one. Returns the
// others' positions.
template <class Backend, class Step>
std::vector<size_t> step_together(Step optim_step, const OptimStepArgs& common, const py::list& params,
                                  const py::list& grads, const py::list& states, int64_t context) {
    static const Keys& keys = *new Keys();
    for (const py::list* list : {&grads, &states}) {
        if (list->size() != params.size())
            bad_argument(
                "optim_step", list == &grads ? "grads" : "states",
                "a list of " + std::to_string(params.size()) + " (params has " + std::to_string(params.size()) + ")",
                std::to_string(list->size()));
    }
    const int per_param = states_of(common.rule);
    Tensors tensors;
    tensors.kept.reserve(params.size() * (2 + 2 * per_param));
    std::vector<Batch> batches;
    std::vector<size_t> left;
    TensorRef first;
    for (size_t i = 0; i < params.size(); ++i) {
        const TensorRef p = tensors(params[i]), g = tensors(grads[i]);
        if (!i) first = p;
        if (!p.contiguous || !g.contiguous || p.device != first.device || p.device_index != first.device_index) {
            left.push_back(i);
            continue;
        }
        const py::handle state = PyList_GET_ITEM(states.ptr(), i);
        if (!PyDict_Check(state.ptr()))
            bad_argument("optim_step", "states", "dictionaries",
                         py::type::of(state).attr("__name__").cast<std::string>());
        const bool quantized = static_cast<bool>(find(state, keys.absmax[0]));
        auto batch = std::find_if(batches.begin(), batches.end(), [&](const Batch& b) {
            return b.dtype == p.dtype && b.args.quantized() == quantized;
        });
        if (batch == batches.end()) {
            batch = batches.insert(batches.end(), {p.dtype, common});
            TensorRef* const maps[2] = {&batch->args.qmap1, &batch->args.qmap2};
            for (int k = 0; quantized && k < per_param; ++k) *maps[k] = tensors(get(state, keys.qmap[k]));
            if (quantized) batch->args.max_unorm = 0;
        }
        OptimStepArgs& a = batch->args;
        a.steps.push_back(py::cast<int64_t>(get(state, keys.step)));
        a.params.push_back(p);
        a.grads.push_back(g);
        std::vector<TensorRef>*const own[2] = {&a.state1, &a.state2}, *const absmax[2] = {&a.absmax1, &a.absmax2};
        for (int k = 0; k < per_param; ++k) {
            own[k]->push_back(tensors(get(state, keys.state[k])));
            if (quantized) absmax[k]->push_back(tensors(get(state, keys.absmax[k])));
        }
        if (a.max_unorm > 0) a.unorm.push_back(tensors(get(state, keys.unorm)));
    }
    for (const Batch& batch : batches) check(batch.args, Backend::device);
    {
        py::gil_scoped_release others_may_run;
        for (const Batch& batch : batches) optim_step(batch.args, Backend::context(context));
    }
    return left;
}

template <class Backend, class Step>
void bind(py::module_& m, Step optim_step) {
    m.def(
        "optim_step",
        [=](const std::string& rule, const py::list& params, const py::list& grads, const py::list& states,
            TensorRef workspace, double lr, double beta1, double beta2, double beta3, double alpha, double eps,
            double weight_decay, double max_unorm, int64_t context) {
            OptimStepArgs common;
            common.rule = optim_rule(rule);
            common.hyper = {lr, beta1, beta2, beta3, alpha, eps, weight_decay};
            common.max_unorm = max_unorm;
            common.workspace = workspace;
            return step_together<Backend>(optim_step, common, params, grads, states, context);
        },
        "rule"_a, "params"_a, "grads"_a, "states"_a, "workspace"_a, "lr"_a, "beta1"_a, "beta2"_a, "beta3"_a, "alpha"_a,
        "eps"_a, "weight_decay"_a, "max_unorm"_a, "context"_a);
}

}  // namespace

void bind_optim_step([[maybe_unused]] py::module_& cpu, [[maybe_unused]] py::module_& cuda) {
#if PYQLORA_BIND_CPU
    bind<CpuBackend>(cpu, cpu::optim_step);
#endif
#if PYQLORA_BIND_CUDA
    bind<CudaBackend>(cuda, cuda::optim_step);
#endif
}

}  // namespace pyqlora
