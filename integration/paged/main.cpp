// Drives the paged engine with random requests and checks every step.
//   paged_engine [STEPS [SEED]]     random life: what is attended equals the naive formula over the rows that were coded,
//                                   and every sequence's records are, byte for byte, those that were written for it
//   paged_engine --bench            decode and prefill with a full batch, tokens a second
#include "engine.hpp"

#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <map>

namespace {

// SplitMix64.
uint64_t mix(uint64_t z) {
    z += 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
}

struct Random {
    uint64_t state;
    uint64_t bits() { return state = mix(state); }
    uint32_t below(uint32_t n) { return static_cast<uint32_t>((bits() >> 32) * n >> 32); }
};

// Rows that depend on a token's history alone, as those of a transformer do.
class Noise : public paged::Model {
public:
    explicit Noise(const dq_layer_desc &shape) : shape_(shape) {}
    void rows(uint32_t layer, uint64_t history, float *q, float *k, float *v) const override {
        uint64_t seed = mix(history ^ layer);
        fill(q, shape_.n_q_heads * shape_.head_dim_k, seed, 0.5f);
        fill(k, shape_.n_kv_heads * shape_.head_dim_k, seed, 2.0f);
        fill(v, shape_.n_kv_heads * shape_.head_dim_v, seed, 1.0f);
    }

private:
    static void fill(float *out, uint32_t n, uint64_t &seed, float offset) {
        for (uint32_t i = 0; i < n; i++) {
            seed = mix(seed);
            out[i] = static_cast<float>(static_cast<int64_t>(seed >> 40) - (1 << 23)) / 8388608.0f + (i % 7 == 0 ? offset : 0);
        }
    }
    dq_layer_desc shape_;
};

dq_layer_desc shape(uint32_t q_heads, uint32_t kv_heads, uint32_t d) {
    auto layer = dq::sized<dq_layer_desc>();
    layer.n_q_heads = q_heads;
    layer.n_kv_heads = kv_heads;
    layer.head_dim_k = layer.head_dim_v = d;
    layer.k_plan = 104;
    layer.v_plan = 4;
    return layer;
}

[[noreturn]] void fail(const char *what, uint64_t step, uint32_t id) {
    std::fprintf(stderr, "step %llu, sequence %u: %s\n", static_cast<unsigned long long>(step), id, what);
    std::exit(1);
}

constexpr uint32_t kLayers = 2, kBlockSlots = 8, kBlocks = 90, kMaxTokens = 48, kMaxSequences = 12, kMaxLength = 260;

class Life {
public:
    explicit Life(uint64_t seed) : random_{seed} {}

    void step(uint64_t number) {
        number_ = number;
        change();
        for (const auto &served : engine_.step()) {
            tokens_ += served.n_q;
            remember(*served.sequence);
            check_attention(served);
        }
        check_records();
        check_blocks();
    }

    void report(uint64_t steps) const {
        std::printf("%llu steps, %llu tokens coded and attended, %llu requests, %llu forks, %llu roll-backs, "
                    "%llu preemptions, %llu blocks shared at once at most; largest error %.1e\n",
                    u(steps), u(tokens_), u(requests_), u(forks_), u(roll_backs_), u(preemptions_), u(shared_), worst_);
        // A life without them has tested nothing.
        if (!forks_ || !roll_backs_ || !preemptions_ || !shared_) fail("something never happened", steps, 0);
    }

private:
    static unsigned long long u(uint64_t n) { return n; }

    // What was written for a sequence: records, and the rows that they decode to, [layer][token].
    struct Shadow {
        std::vector<std::vector<uint8_t>> records[kLayers];
        std::vector<std::vector<float>> k[kLayers], v[kLayers];
        void cut(uint32_t n) {
            for (uint32_t l = 0; l < kLayers; l++) {
                if (records[l].size() <= n) continue;
                records[l].resize(n);
                k[l].resize(n);
                v[l].resize(n);
            }
        }
    };

    paged::Sequence &pick() { return *engine_.sequences()[random_.below(static_cast<uint32_t>(engine_.sequences().size()))]; }

    uint64_t next(uint64_t history) { return mix(history + random_.below(50)); }

    // Requests come, go, are forked, preempted; tokens are appended, drafted and rejected.
    void change() {
        if (engine_.sequences().size() < 20 && random_.below(4) == 0) {
            // Few different beginnings, so that prefixes are shared.
            std::vector<uint64_t> history{mix(random_.below(3))};
            const uint32_t common = random_.below(60), n = 1 + random_.below(120);
            // Or what somebody asked before, rejected drafts included.
            if (!past_.empty() && random_.below(2) == 0) history = past_[random_.below(static_cast<uint32_t>(past_.size()))];
            while (history.size() < n) history.push_back(history.size() < common ? mix(history.back()) : next(history.back()));
            auto *s = engine_.add(history);
            requests_++;
            remember(*s);
        }
        for (const auto &s : engine_.sequences()) {
            if (s->coded != s->history.size() || s->history.size() + 6 >= kMaxLength) continue;
            // One token, or that and drafts behind it.
            const uint32_t n = random_.below(3) == 0 ? 1 + random_.below(5) : 1;
            for (uint32_t i = 0; i < n; i++) s->history.push_back(next(s->history.back()));
        }
        if (engine_.sequences().empty()) return;
        if (random_.below(3) == 0) {
            auto &s = pick();
            const auto n = static_cast<uint32_t>(s.history.size());
            if (n > 12) {
                past_.push_back(s.history);
                if (past_.size() > 8) past_.erase(past_.begin());
                engine_.roll_back(s, n - 1 - random_.below(10));
                shadows_[s.id].cut(s.coded);
                roll_backs_++;
            }
        }
        if (random_.below(12) == 0 && engine_.sequences().size() < 20) {
            const auto &from = pick();
            if (auto *s = engine_.fork(from)) {
                shadows_[s->id] = shadows_[from.id];
                forks_++;
            }
        }
        if (random_.below(20) == 0) engine_.preempt(pick());
        if (random_.below(9) == 0) {
            auto &s = pick();
            shadows_.erase(s.id);
            engine_.remove(&s);
        }
    }

    // Takes down what was written since: a shared block counts as written by whoever wrote it.
    void remember(const paged::Sequence &s) {
        auto &shadow = shadows_[s.id];
        for (uint32_t l = 0; l < kLayers; l++) {
            for (auto i = static_cast<uint32_t>(shadow.records[l].size()); i < s.coded; i++) {
                const uint8_t *record = engine_.record(l, s, i);
                shadow.records[l].emplace_back(record, record + engine_.slot_bytes());
                std::vector<float> k(shape_.n_kv_heads * shape_.head_dim_k), v(shape_.n_kv_heads * shape_.head_dim_v);
                const int64_t slot = engine_.slot(s, i);
                engine_.codec().dequantize(l, engine_.store(l), &slot, 1, dq::Rows(k.data(), 1, shape_.n_kv_heads, shape_.head_dim_k),
                                           dq::Rows(v.data(), 1, shape_.n_kv_heads, shape_.head_dim_v));
                // The row itself: what was coded is this token's, to within the code's error.
                check_row(l, s.history[i], k);
                shadow.k[l].push_back(std::move(k));
                shadow.v[l].push_back(std::move(v));
            }
        }
    }

    void check_row(uint32_t layer, uint64_t history, const std::vector<float> &got) {
        std::vector<float> q(shape_.n_q_heads * shape_.head_dim_k), k(got.size()), v(shape_.n_kv_heads * shape_.head_dim_v);
        model_.rows(layer, history, q.data(), k.data(), v.data());
        double error = 0, size = 0;
        for (size_t i = 0; i < k.size(); i++) {
            error += std::pow(double{k[i]} - double{got[i]}, 2);
            size += std::pow(double{k[i]}, 2);
        }
        if (!(error < 0.1 * size)) fail("a slot holds another token's row", number_, 0);
    }

    // One query and head of each layer.
    void check_attention(const paged::Served &served) {
        const auto &s = *served.sequence;
        const auto &shadow = shadows_[s.id];
        for (uint32_t l = 0; l < kLayers; l++) {
            const uint32_t query = random_.below(served.n_q), h = random_.below(shape_.n_q_heads);
            const uint32_t d = shape_.head_dim_k, head = h / (shape_.n_q_heads / shape_.n_kv_heads);
            const uint32_t n_keys = s.coded - served.n_q + query + 1;
            const float *q = engine_.q(l, served.first_q + query) + h * d;
            std::vector<double> p(n_keys);
            double largest = -INFINITY, total = 0;
            for (uint32_t j = 0; j < n_keys; j++) {
                double sum = 0;
                for (uint32_t i = 0; i < d; i++) sum += double{q[i]} * double{shadow.k[l][j][head * d + i]};
                largest = std::max(largest, p[j] = sum / std::sqrt(double{1} * d));
            }
            for (double &x : p) total += x = std::exp(x - largest);
            double worst = 0, size = 0;
            for (uint32_t i = 0; i < d; i++) {
                double want = 0;
                for (uint32_t j = 0; j < n_keys; j++) {
                    const double x = double{shadow.v[l][j][head * d + i]};
                    want += p[j] / total * x;
                    size += p[j] / total * std::fabs(x);
                }
                worst = std::max(worst, std::fabs(want - double{engine_.out(l, served.first_q + query)[h * d + i]}));
            }
            worst_ = std::max(worst_, worst / (size / d));
            if (!(worst <= 1e-3 * size / d)) fail("attention differs from the naive formula", number_, s.id);
        }
    }

    void check_records() {
        for (const auto &s : engine_.sequences()) {
            shadows_[s->id].cut(s->coded);
            if (s->preempted) {
                preemptions_ += !was_preempted_[s->id];
            } else {
                for (uint32_t l = 0; l < kLayers; l++) {
                    for (uint32_t i = 0; i < s->coded; i++) {
                        if (std::memcmp(engine_.record(l, *s, i), shadows_[s->id].records[l][i].data(), engine_.slot_bytes()) != 0) {
                            fail("a record is not the one that was written", number_, s->id);
                        }
                    }
                }
            }
            was_preempted_[s->id] = s->preempted;
        }
    }

    // Users of blocks add up.
    void check_blocks() {
        std::vector<uint32_t> users(kBlocks);
        for (const auto &s : engine_.sequences()) {
            for (int32_t b : s->blocks) users[static_cast<size_t>(b)]++;
        }
        uint64_t used = 0, shared = 0;
        for (uint32_t b = 0; b < kBlocks; b++) {
            if (users[b] != engine_.pool().users(static_cast<int32_t>(b))) fail("users of a block", number_, b);
            used += users[b] > 0;
            shared += users[b] > 1;
        }
        if (used + engine_.pool().n_free() != kBlocks) fail("blocks are lost", number_, 0);
        shared_ = std::max(shared_, shared);
    }

    Random random_;
    dq_layer_desc shape_ = shape(4, 2, 64);
    Noise model_{shape_};
    paged::Engine engine_{shape_, kLayers, kBlocks, kBlockSlots, kMaxTokens, kMaxSequences, kMaxLength, model_};
    std::map<uint32_t, Shadow> shadows_;
    std::vector<std::vector<uint64_t>> past_;
    std::map<uint32_t, bool> was_preempted_;
    uint64_t number_ = 0, tokens_ = 0, requests_ = 0, forks_ = 0, roll_backs_ = 0, preemptions_ = 0, shared_ = 0;
    double worst_ = 0;
};

// One layer of Llama-3-8B's shape, in one thread; the time of the rows' making is left out.
void bench() {
    class Constant : public paged::Model {
    public:
        void rows(uint32_t, uint64_t, float *, float *, float *) const override {}
    };
    constexpr uint32_t kSequences = 16, kPrompt = 2048, kChunk = 256, kSteps = 32;
    const auto layer = shape(32, 8, 128);
    const Constant model;
    paged::Engine engine(layer, 1, kSequences * (kPrompt + kSteps) / 16 + kSequences, 16, kChunk, kSequences, kPrompt + kSteps, model);
    Random random{1};
    for (uint32_t s = 0; s < kSequences; s++) {
        std::vector<uint64_t> history;
        for (uint32_t i = 0; i < kPrompt; i++) history.push_back(random.bits());
        engine.add(history);
    }
    const auto timed = [&](const char *what, auto more) {
        const auto begin = std::chrono::steady_clock::now();
        uint64_t tokens = 0;
        while (more()) {
            for (const auto &served : engine.step()) tokens += served.n_q;
        }
        const std::chrono::duration<double> took = std::chrono::steady_clock::now() - begin;
        std::printf("%s: %.0f tokens/s a layer\n", what, static_cast<double>(tokens) / took.count());
    };
    timed("prefill in chunks of 256, 16 prompts of 2,048", [&] {
        return engine.sequences().back()->coded < kPrompt;
    });
    uint32_t step = 0;
    timed("decode, batches of 16 at about 2,048", [&] {
        for (const auto &s : engine.sequences()) s->history.push_back(random.bits());
        return step++ < kSteps;
    });
}

}  // namespace

int main(int argc, char **argv) {
    if (argc > 1 && std::strcmp(argv[1], "--bench") == 0) {
        bench();
        return 0;
    }
    const uint64_t steps = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 3000;
    Life life(argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 1);
    for (uint64_t step = 0; step < steps; step++) life.step(step);
    life.report(steps);
    return 0;
}
