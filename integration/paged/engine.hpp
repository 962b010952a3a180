// A paged engine in miniature on libdecoquant: what the author of a vLLM-like engine needs to know about the library.
//
//     one store per layer, cut into blocks of slots; a sequence is a list of blocks
//     continuous batching    every step serves all running sequences in one dq_attend per layer
//     chunked prefill        prompts come in pieces beside single tokens: uneven queries, one batch
//     prefix sharing         full blocks of equal prefixes are shared; a fork copies the records of the last block
//     preemption             records are copied out of the blocks as bytes, and back into others
//     speculative tokens     drafts are coded and attended like others; what is rejected is forgotten, nothing is undone
//
// Records depend on their row and on the factor sets, never on slot or neighbours, and sets are never taken back: that
// is why all of this is copying bytes and counting.
#pragma once

#include <decoquant.hpp>

#include "pool.hpp"

#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

namespace paged {

// Gives the rows of a token: q [n_q_heads][d], k and v [n_kv_heads][d]. A real engine's layers stand here.
class Model {
public:
    virtual ~Model() = default;
    // `history` stands for all tokens up to this one.
    virtual void rows(uint32_t layer, uint64_t history, float *q, float *k, float *v) const = 0;
};

struct Sequence {
    uint32_t id = 0;
    // One entry per token: a hash of all tokens up to it.
    std::vector<uint64_t> history;
    // Tokens whose records are written.
    uint32_t coded = 0;
    std::vector<int32_t> blocks;
    // While preempted: the records of every layer, in order.
    std::vector<std::vector<uint8_t>> parked;
    bool preempted = false;
};

// What one step did for one sequence: its last `n_q` coded tokens were queries, `first_q` the first of them in `out`.
struct Served {
    Sequence *sequence;
    uint32_t n_q, first_q;
};

class Engine {
public:
    Engine(const dq_layer_desc &shape, uint32_t n_layers, uint32_t n_blocks, uint32_t block_slots, uint32_t max_tokens,
           uint32_t max_sequences, uint32_t max_length, const Model &model)
        : shape_(shape), n_layers_(n_layers), max_tokens_(max_tokens), max_sequences_(max_sequences), pool_(n_blocks, block_slots), model_(model) {
        const std::vector<dq_layer_desc> layers(n_layers, shape);
        auto desc = dq::sized<dq_codec_desc>();
        desc.n_layers = n_layers;
        desc.layers = layers.data();
        codec_ = dq::Codec::create(dq::Context::create(), desc);
        slot_bytes_ = codec_.layout(0).slot_bytes;
        for (uint32_t l = 0; l < n_layers; l++) stores_.emplace_back(slot_bytes_ * n_blocks * block_slots);
        auto limits = dq::sized<dq_limits>();
        limits.max_tokens = max_tokens;
        limits.max_streams = max_sequences;
        limits.max_queries = limits.max_total_queries = max_tokens;
        limits.max_kv = max_length;
        workspace_ = dq::Memory(codec_.workspace_size(0, limits));
        q_.resize(size_t{n_layers} * max_tokens * shape.n_q_heads * shape.head_dim_k);
        k_.resize(size_t{max_tokens} * shape.n_kv_heads * shape.head_dim_k);
        v_.resize(size_t{max_tokens} * shape.n_kv_heads * shape.head_dim_v);
        out_.resize(size_t{n_layers} * max_tokens * shape.n_q_heads * shape.head_dim_v);
    }

    // ---- sequences

    Sequence *add(std::vector<uint64_t> history) {
        auto sequence = std::make_unique<Sequence>();
        sequence->id = next_id_++;
        sequence->history = std::move(history);
        share_prefix(*sequence);
        sequences_.push_back(std::move(sequence));
        return sequences_.back().get();
    }

    void remove(Sequence *sequence) {
        shrink(*sequence, 0);
        sequences_.erase(std::find_if(sequences_.begin(), sequences_.end(), [&](auto &s) { return s.get() == sequence; }));
    }

    // A second sequence that goes on from here: full blocks are shared, the records of the last one copied.
    Sequence *fork(const Sequence &from) {
        if (from.preempted) return nullptr;
        auto copy = std::make_unique<Sequence>(from);
        copy->id = next_id_++;
        const bool partial = copy->coded % pool_.block_slots() != 0;
        if (partial) {
            const auto block = pool_.take();
            if (!block) return nullptr;
            for (auto &store : stores_) std::memcpy(at(store, *block), at(store, copy->blocks.back()), block_bytes());
            copy->blocks.back() = *block;
        }
        for (size_t b = 0; b + partial < copy->blocks.size(); b++) pool_.share(copy->blocks[b]);
        sequences_.push_back(std::move(copy));
        return sequences_.back().get();
    }

    // Forgets all tokens behind the first `n`: rejected drafts. Their records stay where they are until overwritten.
    void roll_back(Sequence &sequence, uint32_t n) {
        sequence.history.resize(n);
        if (sequence.coded <= n) return;
        if (sequence.preempted) {
            sequence.coded = n;
        } else {
            shrink(sequence, n);
        }
    }

    void preempt(Sequence &sequence) {
        if (sequence.preempted) return;
        sequence.parked.clear();
        for (const auto &store : stores_) {
            std::vector<uint8_t> bytes(sequence.coded * slot_bytes_);
            for (uint32_t i = 0; i < sequence.coded; i++) std::memcpy(&bytes[i * slot_bytes_], record(store, sequence, i), slot_bytes_);
            sequence.parked.push_back(std::move(bytes));
        }
        const uint32_t coded = sequence.coded;
        shrink(sequence, 0);
        sequence.coded = coded;
        sequence.preempted = true;
    }

    bool resume(Sequence &sequence) {
        if (!sequence.preempted) return true;
        if (!grow(sequence, sequence.coded)) return false;
        for (uint32_t l = 0; l < n_layers_; l++) {
            for (uint32_t i = 0; i < sequence.coded; i++) {
                std::memcpy(record(stores_[l], sequence, i), &sequence.parked[l][i * slot_bytes_], slot_bytes_);
            }
        }
        sequence.parked.clear();
        sequence.preempted = false;
        return true;
    }

    // ---- a step

    // Serves sequences with tokens that are not coded yet, single tokens first, up to the budget; prompts in chunks. When
    // blocks run out, the youngest others are preempted. Returns who was served; `out` has the result.
    const std::vector<Served> &step() {
        served_.clear();
        std::vector<Sequence *> order;
        for (auto &s : sequences_) {
            if (s->coded < s->history.size()) order.push_back(s.get());
        }
        const auto left = [](const Sequence *s) { return s->history.size() - s->coded; };
        std::stable_sort(order.begin(), order.end(), [&](auto *a, auto *b) { return left(a) < left(b); });
        uint32_t budget = max_tokens_;
        for (Sequence *s : order) {
            const auto n = static_cast<uint32_t>(std::min<size_t>(left(s), budget));
            if (n == 0 || served_.size() == max_sequences_) break;
            if (!make_room(*s, s->coded + n)) continue;
            served_.push_back({s, n, max_tokens_ - budget});
            budget -= n;
        }
        if (!served_.empty()) run(max_tokens_ - budget);
        codec_.refit(0, n_layers_);
        return served_;
    }

    // Of the last step: [layer][query][n_q_heads][d].
    const float *out(uint32_t layer, uint32_t query) const { return &out_[(size_t{layer} * max_tokens_ + query) * q_heads_v()]; }
    const float *q(uint32_t layer, uint32_t query) const { return &q_[(size_t{layer} * max_tokens_ + query) * q_heads_k()]; }

    // The record of a token, as bytes.
    const uint8_t *record(uint32_t layer, const Sequence &sequence, uint32_t token) const {
        return record(stores_[layer], sequence, token);
    }
    uint64_t slot_bytes() const { return slot_bytes_; }
    const BlockPool &pool() const { return pool_; }
    const dq::Codec &codec() const { return codec_; }
    const std::vector<std::unique_ptr<Sequence>> &sequences() const { return sequences_; }
    dq_store store(uint32_t layer) const {
        return {stores_[layer].data(), pool_.n_blocks() * pool_.block_slots(), 0};
    }
    int64_t slot(const Sequence &sequence, uint32_t token) const {
        return int64_t{sequence.blocks[token / pool_.block_slots()]} * pool_.block_slots() + token % pool_.block_slots();
    }

private:
    size_t q_heads_k() const { return size_t{shape_.n_q_heads} * shape_.head_dim_k; }
    size_t q_heads_v() const { return size_t{shape_.n_q_heads} * shape_.head_dim_v; }
    size_t block_bytes() const { return slot_bytes_ * pool_.block_slots(); }
    uint8_t *at(const dq::Memory &store, int32_t block) const {
        return static_cast<uint8_t *>(store.data()) + static_cast<size_t>(block) * block_bytes();
    }
    uint8_t *record(const dq::Memory &store, const Sequence &sequence, uint32_t token) const {
        return static_cast<uint8_t *>(store.data()) + static_cast<size_t>(slot(sequence, token)) * slot_bytes_;
    }

    // Blocks for `n` tokens.
    bool grow(Sequence &sequence, uint32_t n) {
        const size_t need = (n + pool_.block_slots() - 1) / pool_.block_slots();
        if (need > sequence.blocks.size() + pool_.n_free()) return false;
        while (sequence.blocks.size() < need) sequence.blocks.push_back(*pool_.take());
        return true;
    }

    void shrink(Sequence &sequence, uint32_t n) {
        const size_t need = (n + pool_.block_slots() - 1) / pool_.block_slots();
        while (sequence.blocks.size() > need) {
            pool_.drop(sequence.blocks.back());
            sequence.blocks.pop_back();
        }
        sequence.coded = n;
        own_last_block(sequence);
    }

    // After a roll-back into a shared block, what comes next must not be written for all of its users.
    void own_last_block(Sequence &sequence) {
        if (sequence.coded % pool_.block_slots() == 0) return;
        if (pool_.users(sequence.blocks.back()) == 1) return pool_.withdraw(sequence.blocks.back());
        const auto block = pool_.take();
        if (!block) {
            // No room to copy: code the tokens of this block again.
            sequence.coded -= sequence.coded % pool_.block_slots();
        } else {
            for (auto &store : stores_) std::memcpy(at(store, *block), at(store, sequence.blocks.back()), block_bytes());
        }
        pool_.drop(sequence.blocks.back());
        sequence.blocks.pop_back();
        if (block) sequence.blocks.push_back(*block);
    }

    bool make_room(Sequence &sequence, uint32_t n) {
        const auto fits = [&] { return resume(sequence) && grow(sequence, n); };
        for (size_t i = sequences_.size(); !fits() && i > 0; i--) {
            Sequence &victim = *sequences_[i - 1];
            const bool busy = std::any_of(served_.begin(), served_.end(), [&](auto &s) { return s.sequence == &victim; });
            if (&victim != &sequence && !busy) preempt(victim);
        }
        return fits();
    }

    // Full blocks that another sequence has coded already. The last token is left: somebody wants its output.
    void share_prefix(Sequence &sequence) {
        const uint32_t size = pool_.block_slots();
        while (sequence.coded + size < sequence.history.size()) {
            const auto block = pool_.find(sequence.history[sequence.coded + size - 1]);
            if (!block) return;
            pool_.share(*block);
            sequence.blocks.push_back(*block);
            sequence.coded += size;
        }
    }

    // Codes the new tokens of all served sequences, then attends, layer by layer.
    void run(uint32_t n_tokens) {
        std::vector<int64_t> slots;
        std::vector<int32_t> positions, starts{0}, lengths, table;
        uint32_t most_q = 0, most_kv = 0;
        for (const auto &s : served_) {
            for (uint32_t i = 0; i < s.n_q; i++) {
                slots.push_back(slot(*s.sequence, s.sequence->coded + i));
                positions.push_back(static_cast<int32_t>(s.sequence->coded + i));
            }
            starts.push_back(static_cast<int32_t>(slots.size()));
            lengths.push_back(static_cast<int32_t>(s.sequence->coded + s.n_q));
            most_q = std::max(most_q, s.n_q);
            most_kv = std::max(most_kv, s.sequence->coded + s.n_q);
        }
        const size_t row = (most_kv + pool_.block_slots() - 1) / pool_.block_slots();
        table.assign(served_.size() * row, -1);
        for (size_t i = 0; i < served_.size(); i++) {
            std::copy_n(served_[i].sequence->blocks.begin(), std::min(row, served_[i].sequence->blocks.size()), &table[i * row]);
        }

        for (uint32_t layer = 0; layer < n_layers_; layer++) {
            float *q = &q_[size_t{layer} * max_tokens_ * q_heads_k()];
            size_t token = 0;
            for (const auto &s : served_) {
                for (uint32_t i = 0; i < s.n_q; i++, token++) {
                    model_.rows(layer, s.sequence->history[s.sequence->coded + i], q + token * q_heads_k(),
                                &k_[token * shape_.n_kv_heads * shape_.head_dim_k],
                                &v_[token * shape_.n_kv_heads * shape_.head_dim_v]);
                }
            }
            auto tokens = dq::sized<dq_tokens>();
            tokens.n_tokens = n_tokens;
            tokens.q = dq::Rows(q, n_tokens, shape_.n_q_heads, shape_.head_dim_k);
            tokens.k = dq::Rows(k_.data(), n_tokens, shape_.n_kv_heads, shape_.head_dim_k);
            tokens.v = dq::Rows(v_.data(), n_tokens, shape_.n_kv_heads, shape_.head_dim_v);
            tokens.positions = positions.data();
            tokens.slots = slots.data();
            tokens.store = store(layer);
            codec_.append(layer, tokens, workspace_.data(), workspace_.size());

            auto args = dq::sized<dq_attend_args>();
            args.n_streams = static_cast<uint32_t>(served_.size());
            args.n_q = most_q;
            args.n_kv = most_kv;
            args.store = store(layer);
            args.q = tokens.q;
            args.out = dq::Rows(&out_[size_t{layer} * max_tokens_ * q_heads_v()], n_tokens, shape_.n_q_heads, shape_.head_dim_v);
            args.sequences.q_starts = starts.data();
            args.sequences.kv_lengths = lengths.data();
            args.sequences.block_table = table.data();
            args.sequences.table_stride = row * sizeof table[0];
            args.sequences.block_slots = pool_.block_slots();
            args.sequences.n_tokens = n_tokens;
            codec_.attend(layer, args, workspace_.data(), workspace_.size());
        }
        for (const auto &s : served_) {
            s.sequence->coded += s.n_q;
            publish(*s.sequence, s.n_q);
        }
    }

    // Blocks that these tokens filled can be shared from now on.
    void publish(const Sequence &sequence, uint32_t n) {
        const uint32_t size = pool_.block_slots();
        for (uint32_t b = (sequence.coded - n) / size; (b + 1) * size <= sequence.coded; b++) {
            pool_.publish(sequence.blocks[b], sequence.history[(b + 1) * size - 1]);
        }
    }

    dq_layer_desc shape_;
    uint32_t n_layers_, max_tokens_, max_sequences_, next_id_ = 0;
    BlockPool pool_;
    const Model &model_;
    dq::Codec codec_;
    uint64_t slot_bytes_ = 0;
    std::vector<dq::Memory> stores_;
    dq::Memory workspace_;
    std::vector<float> q_, k_, v_, out_;
    std::vector<std::unique_ptr<Sequence>> sequences_;
    std::vector<Served> served_;
};

}  // namespace paged
