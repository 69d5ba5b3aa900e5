// The optimizers' update rules, one struct each, for host and device. A rule is made for one tensor and one step: its
// constructor folds the hyperparameters and the step count into float constants. Then for every element
//
//     g = gradient (+ weight_decay * p where the decay is `coupled`)
//     u = rule.update(g, s)          s: the element's `states` values, updated in place
//     p = p * decay - size * u
//
// `signed_states` of the states range over both signs; in 8 bits they take the signed map, the others the unsigned one.
// Every product that the rules do not fuse is rounded, so that all backends give the same bits.
#pragma once
#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "core/quant_types.h"

namespace pyqlora {

enum class OptimRule : uint8_t { adam, ademamix, lion, momentum, rmsprop, adagrad };

// a * b, rounded before anything is added to it: nvcc would fuse the two.
PYQLORA_HD float product(float a, float b) {
#if defined(__CUDA_ARCH__)
    return __fmul_rn(a, b);
#else
    return a * b;
#endif
}

struct Hyper {
    double lr, beta1, beta2, beta3, alpha, eps, weight_decay;
};

struct RuleBase {
    static constexpr bool coupled = false;
    float size, decay, weight_decay;

    RuleBase(double size, double decay, double weight_decay)
        : size(static_cast<float>(size)),
          decay(static_cast<float>(decay)),
          weight_decay(static_cast<float>(weight_decay)) {}
    explicit RuleBase(const Hyper& h) : RuleBase(h.lr, 1.0 - h.lr * h.weight_decay, h.weight_decay) {}
};

struct CoupledRule : RuleBase {
    static constexpr bool coupled = true;
    explicit CoupledRule(const Hyper& h) : RuleBase(h.lr, 1.0, h.weight_decay) {}
};

// m and v: exponential averages of g and g^2 (Kingma & Ba 2015), decay decoupled (Loshchilov & Hutter 2019).
struct Adam : RuleBase {
    static constexpr int states = 2, signed_states = 1;
    float beta1, w1, beta2, w2, eps;

    Adam(const Hyper& h, int64_t step)
        : RuleBase(h), beta1(h.beta1), w1(1.0 - h.beta1), beta2(h.beta2), w2(1.0 - h.beta2) {
        const double correction2 = std::sqrt(1.0 - std::pow(h.beta2, step));
        size = static_cast<float>(h.lr * correction2 / (1.0 - std::pow(h.beta1, step)));
        eps = static_cast<float>(h.eps * correction2);
    }
    PYQLORA_HD float update(float g, float* s) const {
        s[0] = fmaf(w1, g, beta1 * s[0]);
        s[1] = fmaf(w2 * g, g, beta2 * s[1]);
        return s[0] / (sqrtf(s[1]) + eps);
    }
};

// Adam with a second, slow average of g (Pagliardini et al. 2024): s = fast m, slow m, v.
struct AdEMAMix : RuleBase {
    static constexpr int states = 3, signed_states = 2;
    float beta1, w1, beta3, w3, beta2, w2, fast, slow, spread, eps;

    AdEMAMix(const Hyper& h, int64_t step)
        : RuleBase(h),
          beta1(h.beta1),
          w1(1.0 - h.beta1),
          beta3(h.beta3),
          w3(1.0 - h.beta3),
          beta2(h.beta2),
          w2(1.0 - h.beta2),
          fast(1.0 / (1.0 - std::pow(h.beta1, step))),
          slow(h.alpha),
          spread(1.0 / std::sqrt(1.0 - std::pow(h.beta2, step))),
          eps(h.eps) {}
    PYQLORA_HD float update(float g, float* s) const {
        s[0] = fmaf(w1, g, beta1 * s[0]);
        s[1] = fmaf(w3, g, beta3 * s[1]);
        s[2] = fmaf(w2 * g, g, beta2 * s[2]);
        return fmaf(slow, s[1], fast * s[0]) / fmaf(spread, sqrtf(s[2]), eps);
    }
};

// The sign of a look-ahead average (Chen et al. 2023).
struct Lion : RuleBase {
    static constexpr int states = 1, signed_states = 1;
    float beta1, w1, beta2, w2;

    Lion(const Hyper& h, int64_t) : RuleBase(h), beta1(h.beta1), w1(1.0 - h.beta1), beta2(h.beta2), w2(1.0 - h.beta2) {}
    PYQLORA_HD float update(float g, float* s) const {
        const float ahead = fmaf(w1, g, beta1 * s[0]);
        s[0] = fmaf(w2, g, beta2 * s[0]);
        return (ahead > 0.0f ? 1.0f : 0.0f) - (ahead < 0.0f ? 1.0f : 0.0f);
    }
};

// SGD with momentum, no dampening.
struct Momentum : CoupledRule {
    static constexpr int states = 1, signed_states = 1;
    float beta1;

    Momentum(const Hyper& h, int64_t) : CoupledRule(h), beta1(h.beta1) {}
    PYQLORA_HD float update(float g, float* s) const { return s[0] = product(beta1, s[0]) + g; }
};

// bitsandbytes keeps the one state of RMSprop and of Adagrad on the signed map.
struct RMSprop : CoupledRule {
    static constexpr int states = 1, signed_states = 1;
    float beta1, w1, eps;

    RMSprop(const Hyper& h, int64_t) : CoupledRule(h), beta1(h.beta1), w1(1.0 - h.beta1), eps(h.eps) {}
    PYQLORA_HD float update(float g, float* s) const {
        s[0] = fmaf(w1 * g, g, beta1 * s[0]);
        return g / (sqrtf(s[0]) + eps);
    }
};

struct Adagrad : CoupledRule {
    static constexpr int states = 1, signed_states = 1;
    float eps;

    Adagrad(const Hyper& h, int64_t) : CoupledRule(h), eps(h.eps) {}
    PYQLORA_HD float update(float g, float* s) const {
        s[0] = fmaf(g, g, s[0]);
        return g / (sqrtf(s[0]) + eps);
    }
};

inline OptimRule optim_rule(const std::string& text) {
    static constexpr const char* names[] = {"adam", "ademamix", "lion", "momentum", "rmsprop", "adagrad"};
    for (int i = 0; i < 6; ++i) {
        if (text == names[i]) return static_cast<OptimRule>(i);
    }
    throw std::invalid_argument("rule: expected adam, ademamix, lion, momentum, rmsprop or adagrad, got '" + text +
                                "'");
}

template <class Rule>
struct RuleTag {
    using type = Rule;
};

// f(RuleTag<Adam>), ...
template <class F>
void dispatch_rule(OptimRule rule, F f) {
    switch (rule) {
        case OptimRule::adam:
            return f(RuleTag<Adam>{});
        case OptimRule::ademamix:
            return f(RuleTag<AdEMAMix>{});
        case OptimRule::lion:
            return f(RuleTag<Lion>{});
        case OptimRule::momentum:
            return f(RuleTag<Momentum>{});
        case OptimRule::rmsprop:
            return f(RuleTag<RMSprop>{});
        case OptimRule::adagrad:
            return f(RuleTag<Adagrad>{});
    }
}

}  // namespace pyqlora
