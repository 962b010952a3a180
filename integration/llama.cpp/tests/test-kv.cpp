// Tests of the coded KV cache inside llama.cpp. They compare tokens, logits and bytes, not exit codes.
//
//   test-kv -m SMALL.gguf -g SWA.gguf -f TEXT [-t THREADS] [-ngl LAYERS] [CASE...]     all cases, or those named
//   test-kv archs DIR                                                    every small model in DIR: the coded cache against f16
//   test-kv resume MODEL TYPE STATE FACTORS TOKEN POS OUT LAYERS         (what the state case runs as a new process)
//
// Each case prints "ok NAME" or "FAILED NAME: why"; the last line is "N passed, M failed".

#include "ggml-backend.h"
#include "ggml.h"
#include "llama.h"

#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <map>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace fs = std::filesystem;

using tokens = std::vector<llama_token>;
using logits = std::vector<float>;

//
// failures and log
//

static std::string print(const char * fmt, ...) {
    char buf[1024];
    va_list args;
    va_start(args, fmt);
    vsnprintf(buf, sizeof(buf), fmt, args);
    va_end(args);
    return buf;
}

#define REQUIRE(cond, ...) do { if (!(cond)) { throw std::runtime_error(print("line %d: %s: ", __LINE__, #cond) + print(__VA_ARGS__)); } } while (0)

static std::string g_log; // everything llama.cpp said since the last clear()

static void on_log(ggml_log_level level, const char * text, void * /*user*/) {
    if (level != GGML_LOG_LEVEL_DEBUG) {
        g_log += text;
    }
}

static bool logged(const std::string & sentence) {
    return g_log.find(sentence) != std::string::npos;
}

//
// models and contexts
//

struct model_deleter   { void operator()(llama_model   * m) const { llama_model_free(m); } };
struct context_deleter { void operator()(llama_context * c) const { llama_free(c); } };

using model_ptr   = std::unique_ptr<llama_model,   model_deleter>;
using context_ptr = std::unique_ptr<llama_context, context_deleter>;

static int g_threads    = 2;
static int g_gpu_layers = 0;

// without the types that libdecoquant codes on the CPU only, if a device holds the cache
static std::vector<ggml_type> served(std::vector<ggml_type> types) {
    if (g_gpu_layers > 0) {
        types.erase(std::remove(types.begin(), types.end(), GGML_TYPE_DQ8), types.end());
    }
    return types;
}

static model_ptr load(const std::string & path) {
    llama_model_params params = llama_model_default_params();
    params.n_gpu_layers = g_gpu_layers;
    model_ptr res(llama_model_load_from_file(path.c_str(), params));
    REQUIRE(res, "%s does not load", path.c_str());
    return res;
}

struct setup {
    ggml_type   type   = GGML_TYPE_DQ4;
    uint32_t    n_ctx  = 2048; // cells, of all sequences together
    uint32_t    n_seq  = 1;
    bool        unified = true;
    uint32_t    n_ubatch = 512;
    std::string factors;
    std::string factors_out;
    ggml_backend_sched_eval_callback cb = nullptr;
    void *                           ud = nullptr;
    int         n_threads = 0;
};

static llama_context_params params_of(const setup & s) {
    llama_context_params params = llama_context_default_params();
    params.n_ctx           = s.n_ctx;
    params.n_batch         = 2048;
    params.n_ubatch        = s.n_ubatch;
    params.n_seq_max       = s.n_seq;
    params.kv_unified      = s.unified;
    params.n_threads       = s.n_threads ? s.n_threads : g_threads;
    params.n_threads_batch = params.n_threads;
    params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED;
    params.type_k          = s.type;
    params.type_v          = s.type;
    params.cb_eval           = s.cb;
    params.cb_eval_user_data = s.ud;
    params.no_perf         = true;
    return params;
}

static context_ptr make(const model_ptr & model, const setup & s) {
    context_ptr res(llama_init_from_model(model.get(), params_of(s)));
    REQUIRE(res, "no context: %s", g_log.c_str());
    if (!s.factors.empty() || !s.factors_out.empty()) {
        REQUIRE(llama_kv_factors(res.get(), s.factors.c_str(), s.factors_out.c_str()), "%s", g_log.c_str());
    }
    return res;
}

static int n_vocab(llama_context * ctx) {
    return llama_vocab_n_tokens(llama_model_get_vocab(llama_get_model(ctx)));
}

static tokens tokenize(const model_ptr & model, const std::string & text) {
    tokens res(text.size() + 8);
    const int n = llama_tokenize(llama_model_get_vocab(model.get()), text.c_str(), text.size(), res.data(), res.size(), true, false);
    REQUIRE(n > 0, "cannot tokenize");
    res.resize(n);
    return res;
}

//
// decoding
//

struct item {
    llama_token  token;
    llama_pos    pos;
    llama_seq_id seq;
    bool         output;
};

// returns the logits of the items that ask for them, or throws
static std::vector<logits> decode(llama_context * ctx, const std::vector<item> & items) {
    llama_batch batch = llama_batch_init(items.size(), 0, 1);
    for (const auto & it : items) {
        const int i = batch.n_tokens++;
        batch.token   [i]    = it.token;
        batch.pos     [i]    = it.pos;
        batch.n_seq_id[i]    = 1;
        batch.seq_id  [i][0] = it.seq;
        batch.logits  [i]    = it.output;
    }
    const int status = llama_decode(ctx, batch);

    std::vector<logits> res;
    if (status == 0) {
        for (size_t i = 0; i < items.size(); ++i) {
            if (items[i].output) {
                const float * p = llama_get_logits_ith(ctx, i);
                res.emplace_back(p, p + n_vocab(ctx));
            }
        }
    }
    llama_batch_free(batch);
    if (status != 0) {
        throw std::runtime_error(print("llama_decode returned %d", status));
    }
    return res;
}

// one sequence from pos on; the logits of the last token, or of all
static std::vector<logits> feed(llama_context * ctx, const tokens & toks, llama_pos pos, llama_seq_id seq = 0, bool all = false) {
    std::vector<logits> res;
    const size_t n_batch = 256;
    for (size_t i0 = 0; i0 < toks.size(); i0 += n_batch) {
        std::vector<item> items;
        for (size_t i = i0; i < std::min(toks.size(), i0 + n_batch); ++i) {
            items.push_back({ toks[i], pos + (llama_pos) i, seq, all || i + 1 == toks.size() });
        }
        for (auto & l : decode(ctx, items)) {
            res.push_back(std::move(l));
        }
    }
    return res;
}

static llama_token argmax(const logits & l) {
    return std::max_element(l.begin(), l.end()) - l.begin();
}

// greedy continuation of a sequence whose next logits are l
static tokens generate(llama_context * ctx, logits l, llama_pos pos, int n, llama_seq_id seq = 0) {
    tokens res;
    for (int i = 0; i < n; ++i) {
        res.push_back(argmax(l));
        l = feed(ctx, { res.back() }, pos + i, seq)[0];
    }
    return res;
}

// KL divergence of the distribution b from a
static double kld(const logits & a, const logits & b) {
    REQUIRE(a.size() == b.size(), "sizes");
    const double ma = *std::max_element(a.begin(), a.end());
    const double mb = *std::max_element(b.begin(), b.end());
    double sa = 0, sb = 0;
    for (size_t i = 0; i < a.size(); ++i) {
        sa += exp(a[i] - ma);
        sb += exp(b[i] - mb);
    }
    double res = 0;
    for (size_t i = 0; i < a.size(); ++i) {
        const double la = a[i] - ma - log(sa);
        const double lb = b[i] - mb - log(sb);
        res += exp(la)*(la - lb);
    }
    return res;
}

static double mean_kld(const std::vector<logits> & a, const std::vector<logits> & b, size_t from = 0) {
    REQUIRE(a.size() == b.size() && from < a.size(), "%zu and %zu", a.size(), b.size());
    double sum = 0;
    for (size_t i = from; i < a.size(); ++i) {
        sum += kld(a[i], b[i]);
    }
    return sum/(a.size() - from);
}

static bool same(const logits & a, const logits & b) {
    return a.size() == b.size() && memcmp(a.data(), b.data(), a.size()*sizeof(float)) == 0;
}

static std::vector<uint8_t> state_of(llama_context * ctx, llama_seq_id seq) {
    std::vector<uint8_t> res(llama_state_seq_get_size(ctx, seq));
    REQUIRE(llama_state_seq_get_data(ctx, res.data(), res.size(), seq) == res.size(), "state");
    return res;
}

static std::vector<char> read_file(const std::string & path) {
    std::ifstream in(path, std::ios::binary);
    return { std::istreambuf_iterator<char>(in), {} };
}

static void write_file(const std::string & path, const void * data, size_t size) {
    std::ofstream(path, std::ios::binary).write((const char *) data, size);
}

//
// what the cases share
//

struct world {
    std::string self;
    std::string path_small;
    std::string path_swa;
    std::string dir; // for files

    model_ptr small;
    model_ptr swa;

    tokens text;     // for the small model
    tokens text_swa;

    std::string factors; // of the small model, dq4

    tokens slice(size_t from, size_t n) const { return tokens(text.begin() + from, text.begin() + from + n); }
};

// a frozen cache codes a row by itself: what else is in a batch or came before does not matter
static setup frozen(const world & w) {
    setup s;
    s.factors = w.factors;
    return s;
}

// the same rows in other cells, or in a batch of another size, are summed in another order. The model codes its activations
// in 8 bits, so that this alone moves the output by a KLD of a few thousandths; on a GPU, whose sums are shorter and in
// half precision in places, by 0.017 (f16 with flash attention against f32 without)
static double k_order() {
    return g_gpu_layers > 0 ? 0.05 : 0.02;
}

//
// cases
//

static std::string test_greedy(world & w) {
    const tokens prompt = w.slice(0, 200);

    std::map<ggml_type, tokens> res;
    for (ggml_type type : served({ GGML_TYPE_F16, GGML_TYPE_DQ8, GGML_TYPE_DQ4 })) {
        setup s;
        s.type = type;
        context_ptr ctx = make(w.small, s);
        res[type] = generate(ctx.get(), feed(ctx.get(), prompt, 0)[0], prompt.size(), 48);
    }
    REQUIRE(!res.count(GGML_TYPE_DQ8) || res[GGML_TYPE_DQ8] == res[GGML_TYPE_F16], "48 greedy tokens differ between dq8 and f16");

    size_t n = 0;
    while (n < 48 && res[GGML_TYPE_DQ4][n] == res[GGML_TYPE_F16][n]) {
        n++;
    }
    return print("%sdq4 as f16 for %zu tokens", res.count(GGML_TYPE_DQ8) ? "dq8 as f16 for 48 tokens, " : "", n);
}

static std::string test_threads(world & w) {
    const tokens prompt = w.slice(0, 150);

    std::vector<logits> res;
    for (int n : { 1, 2, 3 }) {
        setup s;
        s.n_threads = n;
        context_ptr ctx = make(w.small, s);
        feed(ctx.get(), prompt, 0);
        llama_set_n_threads(ctx.get(), n % 3 + 1, n % 3 + 1); // the number may change between decodes
        res.push_back(feed(ctx.get(), w.slice(150, 20), 150)[0]);
    }
    REQUIRE(same(res[0], res[1]) && same(res[0], res[2]), "logits depend on the number of threads");
    return "the same bits with 1, 2 and 3 threads, learned factors";
}

// several texts, in one batch or each in a context of its own: a prompt at once, then 16 tokens one by one, all texts in
// step. The logits of each text after its prompt and after each of the tokens
static const size_t n_steps = 16;

struct passage {
    size_t from;
    size_t n_prompt;
};

static std::vector<std::vector<logits>> together(const world & w, setup s, const std::vector<passage> & texts) {
    s.n_seq = texts.size();
    context_ptr ctx = make(w.small, s);

    std::vector<std::vector<logits>> res(texts.size());
    auto step = [&](const std::vector<item> & items) {
        const auto cur = decode(ctx.get(), items);
        for (size_t i = 0; i < texts.size(); ++i) {
            res[i].push_back(cur[i]);
        }
    };

    std::vector<item> items;
    for (size_t i = 0; i < texts.size(); ++i) {
        for (size_t j = 0; j < texts[i].n_prompt; ++j) {
            items.push_back({ w.text[texts[i].from + j], (llama_pos) j, (llama_seq_id) i, j + 1 == texts[i].n_prompt });
        }
    }
    step(items);

    for (size_t k = 0; k < n_steps; ++k) {
        items.clear();
        for (size_t i = 0; i < texts.size(); ++i) {
            const size_t j = texts[i].n_prompt + k;
            items.push_back({ w.text[texts[i].from + j], (llama_pos) j, (llama_seq_id) i, true });
        }
        step(items);
    }
    return res;
}

static const std::vector<passage> passages = { { 0, 120 }, { 400, 75 }, { 700, 33 }, { 900, 140 } };

// mean KLD of each text, the largest
static double worst_kld(const std::vector<std::vector<logits>> & a, const std::vector<std::vector<logits>> & b) {
    double res = 0;
    for (size_t i = 0; i < a.size(); ++i) {
        res = std::max(res, mean_kld(a[i], b[i]));
    }
    return res;
}

// in how many places of a hundred the most likely token is the same
static int agreement(const std::vector<std::vector<logits>> & a, const std::vector<std::vector<logits>> & b) {
    int n = 0, n_same = 0;
    for (size_t i = 0; i < a.size(); ++i) {
        for (size_t j = 0; j < a[i].size(); ++j) {
            n++;
            n_same += argmax(a[i][j]) == argmax(b[i][j]);
        }
    }
    return 100*n_same/n;
}

static std::string test_sequences(world & w) {
    const auto batch = together(w, frozen(w), passages);

    std::vector<std::vector<logits>> alone;
    for (const auto & text : passages) {
        alone.push_back(together(w, frozen(w), { text })[0]);
    }

    setup s = frozen(w);
    s.unified = false;
    const auto separate = together(w, s, passages);

    setup s16;
    s16.type = GGML_TYPE_F16;
    const auto f16 = together(w, s16, passages);

    // each of the three is as near to f16 as the others, and they are as near to each other as to f16
    std::string res = "mean KLD to f16 of each text";
    for (size_t i = 0; i < passages.size(); ++i) {
        const double a = mean_kld(f16[i], alone[i]);
        const double b = mean_kld(f16[i], batch[i]);
        const double c = mean_kld(f16[i], separate[i]);
        const double d = std::max(mean_kld(alone[i], batch[i]), mean_kld(alone[i], separate[i]));
        REQUIRE(std::max({ b, c, d }) < 2*a + k_order(), "text %zu: KLD to f16: alone %.4f, in a batch %.4f, in a separate cache %.4f; among them %.4f", i, a, b, c, d);
        res += print("%s alone %.4f, in a batch %.4f, in a separate cache %.4f (among them up to %.4f)", i ? ";" : ":", a, b, c, d);
    }
    return res;
}

static std::string test_learned_sequences(world & w) {
    // factors learned on the way, the rows of four texts mixed in one ubatch, in one stream and in four
    setup s;
    s.type = GGML_TYPE_F16;
    const auto f16 = together(w, s, passages);
    const bool dq8 = g_gpu_layers == 0;
    s.type = dq8 ? GGML_TYPE_DQ8 : GGML_TYPE_DQ4;
    const auto unified = together(w, s, passages);
    s.unified = false;
    const auto separate = together(w, s, passages);

    const double k_unified  = worst_kld(f16, unified);
    const double k_separate = worst_kld(f16, separate);
    const double limit = dq8 ? k_order() : 0.1;
    const int    least = dq8 ? 90 : 80;
    REQUIRE(k_unified < limit && k_separate < limit, "KLD to f16: unified %.4f, separate %.4f", k_unified, k_separate);
    REQUIRE(agreement(f16, unified) >= least && agreement(f16, separate) >= least, "%d%% and %d%% of the tokens", agreement(f16, unified), agreement(f16, separate));
    return print("%s, learning from 4 texts at once, KLD to f16: unified %.4f (%d%% of tokens the same), separate %.4f (%d%%)",
            ggml_type_name(s.type), k_unified, agreement(f16, unified), k_separate, agreement(f16, separate));
}

static std::string test_swa(world & w) {
    // the window is 512: the cells of the sliding-window layers are written over again and again
    const tokens prompt(w.text_swa.begin(), w.text_swa.begin() + 1500);
    const tokens next  (w.text_swa.begin() + 1500, w.text_swa.begin() + 1564);

    std::map<ggml_type, std::vector<logits>> res;
    for (ggml_type type : served({ GGML_TYPE_F16, GGML_TYPE_DQ8, GGML_TYPE_DQ4 })) {
        setup s;
        s.type     = type;
        s.n_ubatch = 128;
        context_ptr ctx = make(w.swa, s);
        res[type] = feed(ctx.get(), prompt, 0);
        for (size_t i = 0; i < next.size(); ++i) {
            res[type].push_back(feed(ctx.get(), { next[i] }, 1500 + i)[0]);
        }
    }
    const double k8 = res.count(GGML_TYPE_DQ8) ? mean_kld(res[GGML_TYPE_F16], res[GGML_TYPE_DQ8]) : 0.0;
    const double k4 = mean_kld(res[GGML_TYPE_F16], res[GGML_TYPE_DQ4]);
    REQUIRE(k8 < k_order() && k4 < (g_gpu_layers > 0 ? 0.08 : 0.05), "mean KLD at 1,500 to 1,564 tokens: dq8 %.5f, dq4 %.5f", k8, k4);
    return print("window of 512, 1,564 tokens: mean KLD dq8 %.5f, dq4 %.5f", k8, k4);
}

static std::string test_holes(world & w) {
    setup s = frozen(w);
    s.n_seq = 2;

    // the tail removed and decoded again: same bits
    context_ptr ctx = make(w.small, s);
    auto * mem = llama_get_memory(ctx.get());
    feed(ctx.get(), w.slice(0, 100), 0);
    const logits before = feed(ctx.get(), w.slice(100, 30), 100)[0];
    REQUIRE(llama_memory_seq_rm(mem, 0, 100, -1), "seq_rm");
    const logits after = feed(ctx.get(), w.slice(100, 30), 100)[0];
    REQUIRE(same(before, after), "decoding a removed tail again gives other logits");

    // a hole over what the text goes on to repeat: whoever still sees it knows the next token, whoever does not cannot
    const tokens repeated = w.slice(700, 48);
    tokens prompt = w.slice(0, 40);
    for (const tokens & more : { repeated, w.slice(40, 66) }) {
        prompt.insert(prompt.end(), more.begin(), more.end());
    }
    const tokens again(repeated.begin(), repeated.begin() + 32);
    enum class hole_kind { none, empty, filled }; // filled: by another sequence, in the meantime
    auto with = [&](hole_kind kind) {
        context_ptr c = make(w.small, s);
        feed(c.get(), prompt, 0);
        REQUIRE(kind == hole_kind::none || llama_memory_seq_rm(llama_get_memory(c.get()), 0, 40, 40 + repeated.size()), "seq_rm");
        if (kind == hole_kind::filled) {
            feed(c.get(), repeated, 0, 1); // whoever sees these would know, too
        }
        return feed(c.get(), again, prompt.size())[0];
    };
    const logits seen = with(hole_kind::none), hole = with(hole_kind::empty), filled = with(hole_kind::filled);

    // and against f16, which has the hole as well
    s.factors = "";
    s.type    = GGML_TYPE_F16;
    const logits f16 = with(hole_kind::empty), f16_filled = with(hole_kind::filled);
    const double k = kld(f16, hole), k_filled = kld(f16_filled, filled), limit = 0.1, matters = kld(hole, seen);
    REQUIRE(matters > 10*limit, "the hole matters too little, KLD %.4f", matters);
    REQUIRE(k < limit && k_filled < limit && kld(hole, filled) < limit,
            "KLD to f16 with the same hole %.5f, filled by another sequence %.5f, between both %.5f", k, k_filled, kld(hole, filled));
    return print("tail again: same bits; KLD to f16 with the same hole %.4f, filled by another sequence %.4f, between both %.1e, without a hole %.2f",
                 k, k_filled, kld(hole, filled), matters);
}

// the rows of a sequence in a state of n_stream streams: what follows the cells' metadata, without the stream markers
static std::vector<uint8_t> rows_of(const std::vector<uint8_t> & state, bool first_stream) {
    // a trailing zero count stands for the empty second stream
    return std::vector<uint8_t>(state.end() - state.size()/2 - (first_stream ? 4 : 0), state.end() - (first_stream ? 4 : 0));
}

static std::string test_streams(world & w) {
    setup s;
    s.n_seq   = 2;
    s.unified = false;
    context_ptr ctx = make(w.small, s);
    auto * mem = llama_get_memory(ctx.get());

    const logits l = feed(ctx.get(), w.slice(0, 300), 0)[0];
    llama_memory_seq_cp(mem, 0, 1, -1, -1);

    // the copy is done with the next decode; each of the two goes on by one token
    const auto next = decode(ctx.get(), { { argmax(l), 300, 0, true }, { argmax(l), 300, 1, true } });
    REQUIRE(same(next[0], next[1]), "a sequence and its copy in another stream continue differently, KLD %.1e", kld(next[0], next[1]));

    const auto a = rows_of(state_of(ctx.get(), 0), true);
    const auto b = rows_of(state_of(ctx.get(), 1), false);
    REQUIRE(a == b, "the records of the copy differ");
    return print("the copy has the same logits and the same %zu bytes of records", a.size());
}

static int run(const std::vector<std::string> & args) {
    const pid_t pid = fork();
    if (pid == 0) {
        std::vector<char *> argv;
        for (const auto & a : args) {
            argv.push_back(const_cast<char *>(a.c_str()));
        }
        argv.push_back(nullptr);
        execv(argv[0], argv.data());
        _exit(127);
    }
    int status = 0;
    waitpid(pid, &status, 0);
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128;
}

static int resume(const std::vector<std::string> & a) {
    world w;
    g_gpu_layers = atoi(a[7].c_str());
    model_ptr model = load(a[0]);
    setup s;
    s.type    = (ggml_type) atoi(a[1].c_str());
    s.factors = a[3] == "-" ? "" : a[3];
    context_ptr ctx = make(model, s);
    const auto state = read_file(a[2]);
    REQUIRE(llama_state_seq_set_data(ctx.get(), (const uint8_t *) state.data(), state.size(), 0) == state.size(), "%s", g_log.c_str());
    const logits l = feed(ctx.get(), { atoi(a[4].c_str()) }, atoi(a[5].c_str()))[0];
    write_file(a[6], l.data(), l.size()*sizeof(float));
    return 0;
}

static std::string test_state(world & w) {
    std::string res;

    for (const bool learned : { false, true }) {
        setup s = learned ? setup() : frozen(w);
        s.n_seq = 3;

        const std::string what = learned ? "learned factors" : "loaded factors";

        context_ptr ctx = make(w.small, s);
        feed(ctx.get(), w.slice(800, 90), 0, 1); // something in the way
        feed(ctx.get(), w.slice(0, 300), 0);
        const auto state = state_of(ctx.get(), 0);

        // what follows is coded by the codec it meets, so its factors must be as good as those that the state comes from
        const tokens next = w.slice(300, 16);
        auto go_on = [&](llama_context * ctx, llama_seq_id seq) {
            std::vector<logits> res;
            for (size_t i = 0; i < next.size(); ++i) {
                res.push_back(feed(ctx, { next[i] }, 300 + i, seq)[0]);
            }
            return res;
        };

        // another slot of the same context
        REQUIRE(llama_state_seq_set_data(ctx.get(), state.data(), state.size(), 2) == state.size(), "%s", g_log.c_str());
        const auto slot = go_on(ctx.get(), 2);
        const auto cont = go_on(ctx.get(), 0);
        REQUIRE(mean_kld(cont, slot) < k_order(), "%s, another slot: mean KLD %.2e", what.c_str(), mean_kld(cont, slot));

        // a fresh context
        setup s1 = s;
        s1.n_seq = 1;
        context_ptr fresh = make(w.small, s1);
        REQUIRE(llama_state_seq_set_data(fresh.get(), state.data(), state.size(), 0) == state.size(), "%s", g_log.c_str());
        if (!learned) {
            REQUIRE(state_of(fresh.get(), 0) == state, "the state saved again differs");
        }
        const auto there = go_on(fresh.get(), 0);
        REQUIRE(mean_kld(cont, there) < k_order(), "%s, a fresh context: mean KLD %.2e", what.c_str(), mean_kld(cont, there));

        // a context that has other sets already
        context_ptr other = make(w.small, s1);
        feed(other.get(), w.slice(1000, 400), 0);
        llama_memory_clear(llama_get_memory(other.get()), true);
        REQUIRE(llama_state_seq_set_data(other.get(), state.data(), state.size(), 0) == state.size(), "%s", g_log.c_str());
        const auto mixed = go_on(other.get(), 0);
        // new rows coded with other fits: each coding is some 0.015 from f16, in a direction of its own
        REQUIRE(mean_kld(cont, mixed) < (learned ? 2*k_order() : k_order()), "%s, a context with sets of its own: mean KLD %.2e", what.c_str(), mean_kld(cont, mixed));

        // a new process: the same bits as the fresh context here
        write_file(w.dir + "/state.bin", state.data(), state.size());
        REQUIRE(run({ w.self, "resume", w.path_small, std::to_string(s.type), w.dir + "/state.bin", learned ? "-" : w.factors,
                    std::to_string(next[0]), "300", w.dir + "/logits.bin", std::to_string(g_gpu_layers) }) == 0, "resume");
        const auto bytes = read_file(w.dir + "/logits.bin");
        REQUIRE(bytes.size() == there[0].size()*sizeof(float) && memcmp(bytes.data(), there[0].data(), bytes.size()) == 0,
                "%s, a new process: other logits than in a fresh context", what.c_str());

        // the whole context
        std::vector<uint8_t> full(llama_state_get_size(fresh.get()));
        REQUIRE(llama_state_get_data(fresh.get(), full.data(), full.size()) == full.size(), "state");
        context_ptr whole = make(w.small, s1);
        REQUIRE(llama_state_set_data(whole.get(), full.data(), full.size()) == full.size(), "%s", g_log.c_str());
        const logits n0 = feed(fresh.get(), w.slice(316, 1), 316)[0];
        const logits n1 = feed(whole.get(), w.slice(316, 1), 316)[0];
        REQUIRE(kld(n0, n1) < k_order(), "%s, the whole context: KLD %.2e", what.c_str(), kld(n0, n1));

        // a damaged state changes nothing but the sequence that it was to fill
        std::vector<uint8_t> bad(state.begin(), state.begin() + state.size()/2);
        REQUIRE(llama_state_seq_set_data(ctx.get(), bad.data(), bad.size(), 1) == 0, "half a state is taken");

        res += print("%s%s: slot %.0e, fresh %.0e, mixed %.0e", res.empty() ? "mean KLD, " : "; ", what.c_str(), mean_kld(cont, slot), mean_kld(cont, there), mean_kld(cont, mixed));
    }
    return res;
}

static std::string test_state_mismatch(world & w) {
    context_ptr a = make(w.small, setup());
    feed(a.get(), w.slice(0, 50), 0);
    const auto state = state_of(a.get(), 0);

    for (ggml_type type : served({ GGML_TYPE_F16, GGML_TYPE_DQ8, GGML_TYPE_DQ3 })) {
        setup s;
        s.type = type;
        context_ptr b = make(w.small, s);
        g_log.clear();
        REQUIRE(llama_state_seq_set_data(b.get(), state.data(), state.size(), 0) == 0, "a %s cache takes a state of dq4", ggml_type_name(type));
        REQUIRE(logged("mismatched key type"), "%s", g_log.c_str());
    }
    return "a state of dq4 is refused by caches of other types";
}

static std::string test_loaded(world & w) {
    const tokens prompt = w.slice(0, 260);

    context_ptr a = make(w.small, frozen(w));
    const logits la = feed(a.get(), prompt, 0)[0];

    context_ptr b = make(w.small, frozen(w));
    feed(b.get(), w.slice(900, 500), 0);
    llama_memory_clear(llama_get_memory(b.get()), false);
    const logits lb = feed(b.get(), prompt, 0)[0];

    REQUIRE(same(la, lb), "what came before changes the output, KLD %.2e", kld(la, lb));

    // written again and loaded again, the factors are the same (the statistics are gone: nothing will be fitted)
    setup s = frozen(w);
    s.factors_out = w.dir + "/again.dqf";
    make(w.small, s).reset();
    s.factors     = s.factors_out;
    s.factors_out = w.dir + "/again2.dqf";
    const logits lc = feed(make(w.small, s).get(), prompt, 0)[0];
    REQUIRE(same(la, lc), "factors that were loaded, saved and loaded give another output, KLD %.2e", kld(la, lc));
    REQUIRE(read_file(s.factors) == read_file(s.factors_out), "saving loaded factors again gives another file");
    return print("same bits whatever came before; %zu bytes of factors", read_file(s.factors).size());
}

static std::string test_factor_files(world & w) {
    const auto file = read_file(w.factors);
    const std::string bad = w.dir + "/bad.dqf";

    auto refused = [&](const model_ptr & model, ggml_type type, const std::string & path, const char * what) {
        setup s;
        s.type = type;
        context_ptr ctx = make(model, s);
        g_log.clear();
        REQUIRE(!llama_kv_factors(ctx.get(), path.c_str(), ""), "%s is taken", what);
        REQUIRE(logged("llama_kv_factors: "), "%s: no sentence", what);
        feed(ctx.get(), { 1, 2, 3 }, 0); // the context still works
    };

    refused(w.swa,   GGML_TYPE_DQ4, w.factors, "a file of another model");
    refused(w.small, GGML_TYPE_DQ3, w.factors, "a file of another type");
    refused(w.small, GGML_TYPE_F16, w.factors, "a file for an f16 cache");
    refused(w.small, GGML_TYPE_DQ4, w.dir + "/none.dqf", "no file");

    for (size_t n : { size_t(0), size_t(10), file.size()/2, file.size() - 1 }) {
        write_file(bad, file.data(), n);
        refused(w.small, GGML_TYPE_DQ4, bad, "a file cut short");
    }
    for (size_t at : { size_t(0), size_t(5), file.size()/3, file.size()/2, file.size() - 1 }) {
        auto copy = file;
        copy[at] ^= 0x10;
        write_file(bad, copy.data(), copy.size());
        refused(w.small, GGML_TYPE_DQ4, bad, "a file with a flipped bit");
    }
    {
        auto copy = file;
        copy.push_back(0);
        write_file(bad, copy.data(), copy.size());
        refused(w.small, GGML_TYPE_DQ4, bad, "a file with a byte too many");
    }

    // RoPE settings belong to the identity
    {
        llama_context_params params = params_of(setup());
        params.rope_freq_base = 12345.0f;
        context_ptr ctx(llama_init_from_model(w.small.get(), params));
        REQUIRE(ctx && !llama_kv_factors(ctx.get(), w.factors.c_str(), ""), "a file of other RoPE settings is taken");
    }

    // not after rows have been written
    context_ptr ctx = make(w.small, setup());
    feed(ctx.get(), { 1, 2, 3 }, 0);
    g_log.clear();
    REQUIRE(!llama_kv_factors(ctx.get(), w.factors.c_str(), ""), "factors are taken after the first decode");
    REQUIRE(logged("after the first decode"), "%s", g_log.c_str());

    // a context that has seen nothing writes nothing
    setup s;
    s.factors_out = w.dir + "/nothing.dqf";
    make(w.small, s).reset();
    REQUIRE(!fs::exists(s.factors_out), "a factor file without rows");

    // both caches of a sliding-window model
    s.factors_out = w.dir + "/swa.dqf";
    {
        context_ptr swa = make(w.swa, s);
        feed(swa.get(), tokens(w.text_swa.begin(), w.text_swa.begin() + 600), 0);
    }
    s.factors     = s.factors_out;
    s.factors_out = "";
    context_ptr swa = make(w.swa, s);
    feed(swa.get(), tokens(w.text_swa.begin(), w.text_swa.begin() + 100), 0);

    return "other model, type and RoPE, cut, flipped, too long, too late: each refused with a sentence";
}

static std::string test_refusals(world & w) {
    auto refused = [&](const llama_context_params & params, const std::string & sentence) {
        g_log.clear();
        context_ptr ctx(llama_init_from_model(w.small.get(), params));
        REQUIRE(!ctx, "a context without: %s", sentence.c_str());
        REQUIRE(logged(sentence), "expected '%s', got: %s", sentence.c_str(), g_log.c_str());
    };

    {
        auto p = params_of(setup());
        p.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_DISABLED;
        refused(p, "a dq4 cache needs flash attention: use -fa on or -fa auto");
    }
    for (int i = 0; i < 2; ++i) {
        auto p = params_of(setup());
        (i ? p.type_k : p.type_v) = GGML_TYPE_F16;
        refused(p, "must both be of a dq type");
    }
    {
        setenv("DECOQUANT_GAUGE", "nonsense", 1);
        refused(params_of(setup()), "DECOQUANT_GAUGE is 'nonsense'");
        unsetenv("DECOQUANT_GAUGE");
    }
    if (g_gpu_layers > 0) {
        setup s;
        s.type = GGML_TYPE_DQ8;
        refused(params_of(s), "use -nkvo to keep it in host memory");
    }

    // auto is on, K and V may be of different dq types, context shift is off
    auto p = params_of(setup());
    p.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_AUTO;
    p.type_v          = GGML_TYPE_DQ3;
    g_log.clear();
    context_ptr ctx(llama_init_from_model(w.small.get(), p));
    REQUIRE(ctx, "%s", g_log.c_str());
    feed(ctx.get(), w.slice(0, 40), 0);
    REQUIRE(!llama_memory_can_shift(llama_get_memory(ctx.get())), "a coded cache offers context shift");
    REQUIRE(logged("bytes per token") && logged("n_rot_k = 0") && logged("n_rot_v = 0"), "%s", g_log.c_str());
    g_log.clear();
    ctx.reset();
    REQUIRE(logged("sets of K"), "no word about the sets at the end: %s", g_log.c_str());

    return "-fa off, one side only, an unknown gauge; -fa auto with dq4 and dq3 works";
}

// edits K after RoPE
struct edit_k {
    std::function<void(int il, float * k, int64_t n_embd, int64_t n_head, int64_t n_tokens)> fun;

    static bool callback(ggml_tensor * t, bool ask, void * ud) {
        if (t->op != GGML_OP_ROPE || strncmp(t->name, "Kcur-", 5) != 0) {
            return !ask;
        }
        if (!ask) {
            std::vector<float> data(ggml_nelements(t));
            REQUIRE(ggml_is_contiguous(t) && t->type == GGML_TYPE_F32, "K");
            ggml_backend_tensor_get(t, data.data(), 0, ggml_nbytes(t));
            ((edit_k *) ud)->fun(atoi(t->name + 5), data.data(), t->ne[0], t->ne[1], t->ne[2]);
            ggml_backend_tensor_set(t, data.data(), 0, ggml_nbytes(t));
        }
        return true;
    }
};

static std::string test_nan(world & w) {
    for (const float value : { NAN, INFINITY }) {
        bool on = false;

        edit_k edit;
        edit.fun = [&](int il, float * k, int64_t n_embd, int64_t, int64_t n_tokens) {
            if (on && il == 7) {
                k[(n_tokens/2)*n_embd + 3] = value;
            }
        };

        setup s = frozen(w); // or the failed batch would count in what is learned
        s.cb = edit_k::callback;
        s.ud = &edit;
        context_ptr ctx = make(w.small, s);
        const logits before = feed(ctx.get(), w.slice(0, 60), 0)[0];

        on = true;
        g_log.clear();
        const auto fails = [&](size_t from, size_t n) {
            try {
                feed(ctx.get(), w.slice(from, n), from);
            } catch (const std::exception &) {
                return true;
            }
            return false;
        };
        bool failed = fails(60, 20);
        if (!failed && g_gpu_layers > 0) {
            // what a device finds is told with the next batch
            on = false;
            failed = fails(80, 1);
        }
        REQUIRE(failed, "llama_decode does not notice %f in K", value);
        REQUIRE(logged(g_gpu_layers > 0 ? "holds NaN, infinity" : "layer 7: "), "%s", g_log.c_str());
        REQUIRE(llama_memory_seq_rm(llama_get_memory(ctx.get()), 0, 60, -1), "seq_rm");

        // the failure is over with the batch: the same tokens without it, as in a context that never saw it
        on = false;
        const logits after = feed(ctx.get(), w.slice(60, 20), 60)[0];
        context_ptr ref = make(w.small, frozen(w));
        feed(ref.get(), w.slice(0, 60), 0);
        const logits good = feed(ref.get(), w.slice(60, 20), 60)[0];
        REQUIRE(std::isfinite(after[0]) && kld(good, after) < 0.02, "KLD %.2e after the failure", kld(good, after));
    }
    return "NaN and infinity in K of layer 7 fail the decode, the next one works";
}

static std::string test_offset(world & w) {
    const tokens text = w.slice(0, 512);

    // mean and spread of each channel of K
    std::map<int, std::vector<double>> sum, sq;
    double n = 0;
    edit_k measure;
    measure.fun = [&](int il, float * k, int64_t n_embd, int64_t n_head, int64_t n_tokens) {
        sum[il].resize(n_embd*n_head);
        sq [il].resize(n_embd*n_head);
        for (int64_t t = 0; t < n_tokens; ++t) {
            for (int64_t i = 0; i < n_embd*n_head; ++i) {
                sum[il][i] += k[t*n_embd*n_head + i];
                sq [il][i] += k[t*n_embd*n_head + i]*k[t*n_embd*n_head + i];
            }
        }
        n += il == 0 ? n_tokens : 0;
    };

    setup s;
    s.type     = GGML_TYPE_F16;
    s.n_ubatch = 128;
    s.cb       = edit_k::callback;
    s.ud       = &measure;
    const auto base = feed(make(w.small, s).get(), text, 0, 0, true);

    edit_k shift;
    shift.fun = [&](int il, float * k, int64_t n_embd, int64_t n_head, int64_t n_tokens) {
        for (int64_t i = 0; i < n_embd*n_head; ++i) {
            const double mean   = sum[il][i]/n;
            const double spread = sqrt(std::max(0.0, sq[il][i]/n - mean*mean));
            const double sign   = (i*2654435761u >> 7) & 1 ? 1.0 : -1.0;
            const float  offset = sign*(50 + (i*40503u >> 3) % 101)*spread; // 50 to 150 times the spread
            for (int64_t t = 0; t < n_tokens; ++t) {
                k[t*n_embd*n_head + i] += offset;
            }
        }
    };

    auto run = [&](ggml_type type, edit_k * edit) {
        setup s;
        s.type     = type;
        s.n_ubatch = 128;
        s.cb       = edit ? edit_k::callback : nullptr;
        s.ud       = edit;
        return mean_kld(base, feed(make(w.small, s).get(), text, 0, 0, true), 16);
    };

    const double d4  = run(GGML_TYPE_DQ4,  nullptr);
    const double d4o = run(GGML_TYPE_DQ4,  &shift);
    const double q4o = run(GGML_TYPE_Q4_0, &shift);
    const double q8o = run(GGML_TYPE_Q8_0, &shift);

    REQUIRE(d4o < 1.5*d4 + 0.005, "mean KLD of dq4: %.4f, with offsets %.4f", d4, d4o);
    return print("K moved by 50 to 150 times its spread: mean KLD dq4 %.4f -> %.4f, q8_0 -> %.4f, q4_0 -> %.4f", d4, d4o, q8o, q4o);
}

static std::string test_warmup(world & w) {
    const tokens prompt = w.slice(0, 300);

    context_ptr a = make(w.small, setup());
    const logits la = feed(a.get(), prompt, 0)[0];

    context_ptr b = make(w.small, setup());
    llama_kv_observe(b.get(), false);
    feed(b.get(), w.slice(1000, 200), 0);
    llama_memory_clear(llama_get_memory(b.get()), true);
    llama_kv_observe(b.get(), true);
    const logits lb = feed(b.get(), prompt, 0)[0];

    REQUIRE(same(la, lb), "a warm-up changes the output, KLD %.2e", kld(la, lb));

    // without the switch it does, so the case can fail
    context_ptr c = make(w.small, setup());
    feed(c.get(), w.slice(1000, 200), 0);
    llama_memory_clear(llama_get_memory(c.get()), true);
    const logits lc = feed(c.get(), prompt, 0)[0];
    return print("same bits after a warm-up of 200 tokens (observed, they would move the output by KLD %.1e)", kld(la, lc));
}

static std::string test_chat(world & w) {
    // 30 tokens of prompt, the rest one at a time: factors are learned on the way
    std::map<ggml_type, std::vector<logits>> res;
    for (ggml_type type : { GGML_TYPE_F16, GGML_TYPE_DQ4 }) {
        setup s;
        s.type = type;
        context_ptr ctx = make(w.small, s);
        res[type] = feed(ctx.get(), w.slice(0, 30), 0);
        for (int i = 30; i < 400; ++i) {
            res[type].push_back(feed(ctx.get(), w.slice(i, 1), i)[0]);
        }
        g_log.clear();
    }
    const double k = mean_kld(res[GGML_TYPE_F16], res[GGML_TYPE_DQ4]);
    REQUIRE(k < (g_gpu_layers > 0 ? 0.06 : 0.03), "mean KLD %.4f", k);
    REQUIRE(logged("sets of K"), "%s", g_log.c_str());
    const size_t at = g_log.find("layers: ");
    return print("30 + 370 x 1 tokens: mean KLD %.4f; %s", k, g_log.substr(at + 8, g_log.find(" rows", at) - at - 8).c_str());
}

//
// every architecture that the tree can make a small model of
//

static int archs(const std::string & dir) {
    std::vector<fs::path> files;
    for (const auto & e : fs::directory_iterator(dir)) {
        if (e.path().extension() == ".gguf") {
            files.push_back(e.path());
        }
    }
    std::sort(files.begin(), files.end());

    int n_failed = 0, n_coded = 0, n_refused = 0, n_skipped = 0;
    std::map<std::string, std::string> refusals;

    for (const auto & file : files) {
        const std::string name = file.stem().string();

        llama_model_params mp = llama_model_default_params();
        mp.n_gpu_layers = 0;
        model_ptr model(llama_model_load_from_file(file.c_str(), mp));
        if (!model || !llama_model_has_decoder(model.get()) || llama_model_has_encoder(model.get())) {
            n_skipped++;
            continue;
        }

        const int n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(model.get()));

        auto eval = [&](ggml_type type, std::vector<logits> & res) {
            setup s;
            s.type     = type;
            s.n_ctx    = 256;
            s.n_ubatch = 64;
            llama_context_params params = params_of(s);
            params.flash_attn_type = type == GGML_TYPE_F16 ? LLAMA_FLASH_ATTN_TYPE_AUTO : LLAMA_FLASH_ATTN_TYPE_ENABLED;
            context_ptr ctx(llama_init_from_model(model.get(), params));
            if (!ctx || !llama_get_memory(ctx.get())) {
                return false;
            }
            tokens toks;
            for (int i = 0; i < 56; ++i) {
                toks.push_back((i*7919 + 13) % n_vocab);
            }
            res = feed(ctx.get(), tokens(toks.begin(), toks.begin() + 48), 0, 0, true);
            for (int i = 48; i < 56; ++i) {
                res.push_back(feed(ctx.get(), { toks[i] }, i)[0]);
            }
            return true;
        };

        std::vector<logits> f16, dq8;
        try {
            if (!eval(GGML_TYPE_F16, f16)) {
                n_skipped++;
                continue;
            }
        } catch (const std::exception &) {
            n_skipped++;
            continue;
        }

        g_log.clear();
        try {
            if (!eval(GGML_TYPE_DQ8, dq8)) {
                const size_t at = g_log.find("a dq");
                const size_t lib = g_log.find("libdecoquant cannot");
                const size_t from = std::min(at, lib);
                if (from == std::string::npos) {
                    printf("FAILED arch %s: refused without a sentence: %s\n", name.c_str(), g_log.c_str());
                    n_failed++;
                } else {
                    refusals[name] = g_log.substr(from, g_log.find('\n', from) - from);
                    n_refused++;
                }
                continue;
            }
            double err = 0, ref = 0;
            for (size_t i = 0; i < f16.size(); ++i) {
                for (size_t j = 0; j < f16[i].size(); ++j) {
                    err += (f16[i][j] - dq8[i][j])*(f16[i][j] - dq8[i][j]);
                    ref += f16[i][j]*f16[i][j];
                }
            }
            const bool ok = err <= 1e-4*ref;
            printf("%s arch %s: normalised error of dq8 against f16 %.1e\n", ok ? "ok" : "FAILED", name.c_str(), err/ref);
            (ok ? n_coded : n_failed)++;
        } catch (const std::exception & e) {
            printf("FAILED arch %s: %s %s\n", name.c_str(), e.what(), g_log.c_str());
            n_failed++;
        }
        fflush(stdout);
    }
    for (const auto & [name, sentence] : refusals) {
        printf("refused %s: %s\n", name.c_str(), sentence.c_str());
    }
    printf("%d architectures coded, %d refused with a sentence, %d without an f16 run to compare\n", n_coded, n_refused, n_skipped);
    printf("%d passed, %d failed\n", n_coded + n_refused, n_failed);
    return n_failed != 0;
}

int main(int argc, char ** argv) {
    llama_log_set(on_log, nullptr);
    llama_backend_init();

    const std::vector<std::string> args(argv + 1, argv + argc);

    try {
        if (args.size() == 2 && args[0] == "archs") {
            return archs(args[1]);
        }
        if (args.size() == 9 && args[0] == "resume") {
            return resume({ args.begin() + 1, args.end() });
        }
    } catch (const std::exception & e) {
        printf("FAILED %s: %s\n", args[0].c_str(), e.what());
        return 1;
    }

    const std::vector<std::pair<std::string, std::string (*)(world &)>> cases = {
        { "greedy",            test_greedy },
        { "threads",           test_threads },
        { "sequences",         test_sequences },
        { "learned-sequences", test_learned_sequences },
        { "swa",               test_swa },
        { "holes",             test_holes },
        { "streams",           test_streams },
        { "state",             test_state },
        { "state-mismatch",    test_state_mismatch },
        { "loaded",            test_loaded },
        { "factor-files",      test_factor_files },
        { "refusals",          test_refusals },
        { "nan",               test_nan },
        { "offset",            test_offset },
        { "warmup",            test_warmup },
        { "chat",              test_chat },
    };

    world w;
    w.self = fs::read_symlink("/proc/self/exe").string();

    std::string text;
    std::vector<std::string> names;
    for (size_t i = 0; i < args.size(); ++i) {
        const bool more = i + 1 < args.size();
        if      (args[i] == "-m" && more) { w.path_small = args[++i]; }
        else if (args[i] == "-g" && more) { w.path_swa   = args[++i]; }
        else if (args[i] == "-t" && more) { g_threads    = atoi(args[++i].c_str()); }
        else if (args[i] == "-ngl" && more) { g_gpu_layers = atoi(args[++i].c_str()); }
        else if (args[i] == "-f" && more) { const auto f = read_file(args[++i]); text.assign(f.begin(), f.end()); }
        else                              { names.push_back(args[i]); }
    }

    char dir[] = "/tmp/test-kv.XXXXXX";
    w.dir = mkdtemp(dir);

    int n_passed = 0, n_failed = 0;
    try {
        w.small    = load(w.path_small);
        w.swa      = load(w.path_swa);
        w.text     = tokenize(w.small, text);
        w.text_swa = tokenize(w.swa,   text);
        REQUIRE(w.text.size() > 3000 && w.text_swa.size() > 3000, "the text is too short");

        // factors for the cases that want them frozen, from text that the cases do not use
        setup s;
        s.factors_out = w.dir + "/small.dqf";
        {
            context_ptr ctx = make(w.small, s);
            feed(ctx.get(), w.slice(1500, 1400), 0);
        }
        w.factors = s.factors_out;
        REQUIRE(fs::exists(w.factors), "no factor file was written: %s", g_log.c_str());
    } catch (const std::exception & e) {
        printf("FAILED setup: %s\n0 passed, 1 failed\n", e.what());
        return 1;
    }

    for (const auto & [name, fun] : cases) {
        if (!names.empty() && std::find(names.begin(), names.end(), name) == names.end()) {
            continue;
        }
        const int64_t t0 = ggml_time_ms();
        try {
            g_log.clear();
            const std::string what = fun(w);
            printf("ok %s: %s (%.1f s)\n", name.c_str(), what.c_str(), (ggml_time_ms() - t0)/1000.0);
            n_passed++;
        } catch (const std::exception & e) {
            printf("FAILED %s: %s\n", name.c_str(), e.what());
            n_failed++;
        }
        fflush(stdout);
    }

    fs::remove_all(w.dir);
    w.small.reset();
    w.swa.reset();
    llama_backend_free();

    printf("%d passed, %d failed\n", n_passed, n_failed);
    return n_failed != 0;
}
