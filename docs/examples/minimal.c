/* A context, a codec, slots, a prompt, a decoded token, attention. docs/api.md goes through it. */
#include <decoquant.h>

#include <stdio.h>
#include <stdlib.h>

enum { Q_HEADS = 8, KV_HEADS = 2, DIM = 128, PROMPT = 100, SLOTS = 256 };

static void check(dq_status status) {
    if (status == DQ_OK || status == DQ_ROWS_REPLACED) return;
    char text[1024];
    dq_last_error(text, sizeof text);
    fprintf(stderr, "%s: %s\n", dq_status_name(status), text);
    exit(1);
}

/* [tokens][heads][DIM] of f32 without gaps. */
static dq_tensor rows(float *data, uint64_t heads) {
    dq_tensor tensor = {.data = data, .dtype = DQ_F32};
    tensor.head_stride = DIM * sizeof *data;
    tensor.token_stride = heads * tensor.head_stride;
    return tensor;
}

static void *aligned(uint64_t bytes) { return aligned_alloc(64, (size_t)(bytes + 63) / 64 * 64); }

int main(void) {
    /* 1. A backend. Null is the CPU. */
    dq_context *context;
    check(dq_context_create(NULL, &context));

    /* 2. A model: shapes and widths of each layer. */
    dq_layer_desc layer = {.struct_size = sizeof layer, .n_q_heads = Q_HEADS, .n_kv_heads = KV_HEADS,
                           .head_dim_k = DIM, .head_dim_v = DIM, .k_plan = 104, .v_plan = 4};
    dq_codec_desc model = {.struct_size = sizeof model, .n_layers = 1, .layers = &layer};
    dq_codec *codec;
    check(dq_codec_create(context, &model, &codec));

    /* 3. Memory: yours. One record per token and layer, in any slot. */
    dq_layout layout = {.struct_size = sizeof layout};
    check(dq_codec_layout(codec, 0, SLOTS, &layout));
    dq_store store = {.n_slots = SLOTS};
    store.data = aligned(SLOTS * layout.slot_bytes);
    dq_limits limits = {.struct_size = sizeof limits, .max_tokens = PROMPT, .max_queries = PROMPT, .max_kv = SLOTS};
    uint64_t bytes;
    check(dq_workspace_size(codec, 0, &limits, &bytes));
    void *workspace = aligned(bytes);

    /* 4. Prefill: learn from the rows, fit when due, code them into slots. */
    static float q[PROMPT * Q_HEADS * DIM], k[PROMPT * KV_HEADS * DIM], v[PROMPT * KV_HEADS * DIM], out[Q_HEADS * DIM];
    for (size_t i = 0; i < sizeof q / sizeof *q; i++) q[i] = (float)(i * 7919 % 1000) / 500 - 1;
    for (size_t i = 0; i < sizeof k / sizeof *k; i++) k[i] = (float)(i * 104729 % 1000) / 500 - 1;
    for (size_t i = 0; i < sizeof v / sizeof *v; i++) v[i] = (float)(i * 1299709 % 1000) / 500 - 1;
    int64_t slots[PROMPT];
    int32_t positions[PROMPT];
    for (int i = 0; i < PROMPT; i++) {
        slots[i] = i;
        positions[i] = i;
    }
    dq_tokens tokens = {.struct_size = sizeof tokens, .n_tokens = PROMPT, .positions = positions, .slots = slots,
                        .store = store};
    tokens.q = rows(q, Q_HEADS);
    tokens.k = rows(k, KV_HEADS);
    tokens.v = rows(v, KV_HEADS);
    check(dq_compress(codec, 0, &tokens, workspace, bytes, NULL));

    /* 5. Decode: code one more token, with what was learned; between steps, fit where due. */
    tokens.n_tokens = 1;
    slots[0] = positions[0] = PROMPT;
    check(dq_append(codec, 0, &tokens, workspace, bytes, NULL));
    check(dq_refit(codec, 0, 1, NULL));

    /* 6. Attention of that token over all slots so far. */
    dq_attend_args args = {.struct_size = sizeof args, .n_q = 1, .n_kv = PROMPT + 1, .store = store};
    args.q = rows(q, Q_HEADS);
    args.out = rows(out, Q_HEADS);
    check(dq_attend(codec, 0, &args, workspace, bytes, NULL));
    printf("%.2f bits per value; out[0] = %.4f\n", layout.bits_per_value, (double)out[0]);

    dq_codec_destroy(codec);
    dq_context_destroy(context);
    free(workspace);
    free(store.data);
    return 0;
}
