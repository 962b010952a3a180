/* A whole life in C11: context, codec, slots, a prompt, attention, the end. Also how an engine would begin. */
#include <decoquant.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { N_Q_HEADS = 4, N_KV_HEADS = 2, D = 64, TOKENS = 24 };

static void check(dq_status status, const char *what) {
    if (status != DQ_OK) {
        char text[1024];
        dq_last_error(text, sizeof text);
        fprintf(stderr, "%s: %s: %s\n", what, dq_status_name(status), text);
        exit(1);
    }
}

static dq_tensor rows(float *data, uint64_t heads) {
    dq_tensor tensor = {0};
    tensor.data = data;
    tensor.dtype = DQ_F32;
    tensor.head_stride = D * sizeof(float);
    tensor.token_stride = heads * D * sizeof(float);
    return tensor;
}

static void fill(float *data, size_t n, unsigned seed) {
    for (size_t i = 0; i < n; i++) {
        seed = seed * 1664525u + 1013904223u;
        data[i] = (float)(seed >> 8) / (float)(1u << 23) - 1.0f;
    }
}

int main(void) {
    dq_context *context = NULL;
    check(dq_context_create(NULL, &context), "dq_context_create");

    dq_layer_desc layer = {0};
    layer.struct_size = sizeof layer;
    layer.n_q_heads = N_Q_HEADS;
    layer.n_kv_heads = N_KV_HEADS;
    layer.head_dim_k = layer.head_dim_v = D;
    layer.k_plan = layer.v_plan = 4;
    dq_codec_desc model = {0};
    model.struct_size = sizeof model;
    model.n_layers = 1;
    model.layers = &layer;
    dq_codec *codec = NULL;
    check(dq_codec_create(context, &model, &codec), "dq_codec_create");
    dq_context_destroy(context);

    dq_layout layout = {0};
    layout.struct_size = sizeof layout;
    check(dq_codec_layout(codec, 0, TOKENS, &layout), "dq_codec_layout");
    dq_store store = {0};
    store.n_slots = TOKENS;
    store.data = aligned_alloc(64, (TOKENS * layout.slot_bytes + 63) / 64 * 64);

    static float q[TOKENS * N_Q_HEADS * D], k[TOKENS * N_KV_HEADS * D], v[TOKENS * N_KV_HEADS * D];
    static float out[TOKENS * N_Q_HEADS * D];
    fill(q, sizeof q / sizeof *q, 1);
    fill(k, sizeof k / sizeof *k, 2);
    fill(v, sizeof v / sizeof *v, 3);
    int64_t slots[TOKENS];
    int32_t positions[TOKENS];
    for (int i = 0; i < TOKENS; i++) {
        slots[i] = TOKENS - 1 - i;
        positions[i] = i;
    }
    dq_tokens tokens = {0};
    tokens.struct_size = sizeof tokens;
    tokens.n_tokens = TOKENS;
    tokens.q = rows(q, N_Q_HEADS);
    tokens.k = rows(k, N_KV_HEADS);
    tokens.v = rows(v, N_KV_HEADS);
    tokens.positions = positions;
    tokens.slots = slots;
    tokens.store = store;
    check(dq_compress(codec, 0, &tokens, NULL, 0, NULL), "dq_compress");

    dq_limits limits = {0};
    limits.struct_size = sizeof limits;
    limits.max_queries = limits.max_kv = TOKENS;
    uint64_t bytes = 0;
    check(dq_workspace_size(codec, 0, &limits, &bytes), "dq_workspace_size");
    void *workspace = aligned_alloc(64, (bytes + 63) / 64 * 64);

    dq_attend_args args = {0};
    args.struct_size = sizeof args;
    args.n_q = args.n_kv = TOKENS;
    args.store = store;
    args.q = rows(q, N_Q_HEADS);
    args.out = rows(out, N_Q_HEADS);
    check(dq_attend(codec, 0, &args, workspace, bytes, NULL), "dq_attend");

    double sum = 0;
    for (size_t i = 0; i < sizeof out / sizeof *out; i++) {
        sum += out[i] < 0 ? -(double)out[i] : (double)out[i];
    }
    int fine = sum > 1.0 && sum < (double)(sizeof out / sizeof *out);
    printf("libdecoquant %s: %.2f bits per value, mean |out| %.3f\n", dq_version(), layout.bits_per_value,
           sum / (double)(sizeof out / sizeof *out));
    dq_codec_destroy(codec);
    free(workspace);
    free(store.data);
    return fine ? 0 : 1;
}
