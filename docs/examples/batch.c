/* Uneven sequences over blocks of slots in one call: a chunk of a prompt beside single tokens, two sequences sharing their
   first block, a dense tail. docs/api.md goes through it. */
#include <decoquant.h>

#include <stdio.h>
#include <stdlib.h>

enum { Q_HEADS = 4, KV_HEADS = 2, DIM = 64, BLOCK = 16, BLOCKS = 8, SLOTS = BLOCK * BLOCKS, TAIL = 4 };

static void check(dq_status status) {
    if (status == DQ_OK || status == DQ_ROWS_REPLACED) return;
    char text[1024];
    dq_last_error(text, sizeof text);
    fprintf(stderr, "%s: %s\n", dq_status_name(status), text);
    exit(1);
}

static dq_tensor rows(float *data, uint64_t heads) {
    dq_tensor tensor = {.data = data, .dtype = DQ_F32};
    tensor.head_stride = DIM * sizeof *data;
    tensor.token_stride = heads * tensor.head_stride;
    return tensor;
}

int main(void) {
    dq_context *context;
    check(dq_context_create(NULL, &context));
    dq_layer_desc layer = {.struct_size = sizeof layer, .n_q_heads = Q_HEADS, .n_kv_heads = KV_HEADS,
                           .head_dim_k = DIM, .head_dim_v = DIM, .k_plan = 104, .v_plan = 4};
    dq_codec_desc model = {.struct_size = sizeof model, .n_layers = 1, .layers = &layer};
    dq_codec *codec;
    check(dq_codec_create(context, &model, &codec));
    dq_layout layout = {.struct_size = sizeof layout};
    check(dq_codec_layout(codec, 0, 0, &layout));
    dq_store store = {.n_slots = SLOTS, .data = aligned_alloc(64, (SLOTS * layout.slot_bytes + 63) / 64 * 64)};

    static float q[SLOTS * Q_HEADS * DIM], kv[SLOTS * KV_HEADS * DIM], out[6 * Q_HEADS * DIM];
    for (size_t i = 0; i < sizeof q / sizeof *q; i++) q[i] = (float)(i * 7919 % 1000) / 500 - 1;
    for (size_t i = 0; i < sizeof kv / sizeof *kv; i++) kv[i] = (float)(i * 104729 % 1000) / 500 - 1;
    int64_t slots[SLOTS];
    for (int i = 0; i < SLOTS; i++) slots[i] = i;
    dq_tokens tokens = {.struct_size = sizeof tokens, .n_tokens = SLOTS, .slots = slots, .store = store};
    tokens.q = rows(q, Q_HEADS);
    tokens.k = tokens.v = rows(kv, KV_HEADS);
    check(dq_compress(codec, 0, &tokens, NULL, 0, NULL));

    /* Three sequences: 40 keys and 1 query; 20 keys, of which the last 4 are queries; 33 keys, 1 query and a tail of 4
       keys that are not coded. The first two share block 5. */
    const int32_t q_starts[] = {0, 1, 5, 6}, kv_lengths[] = {40, 20, 33}, tail_lengths[] = {0, 0, TAIL}, tail_starts[] = {0, 0, 0};
    const int32_t table[3][3] = {{5, 2, 7}, {5, 0, -1}, {1, 3, 4}};

    dq_attend_args args = {.struct_size = sizeof args, .n_streams = 3, .n_q = 4, .n_kv = 40, .store = store};
    args.q = rows(q, Q_HEADS);
    args.out = rows(out, Q_HEADS);
    args.sequences.q_starts = q_starts;
    args.sequences.kv_lengths = kv_lengths;
    args.sequences.block_table = &table[0][0];
    args.sequences.table_stride = sizeof table[0];
    args.sequences.block_slots = BLOCK;
    args.sequences.n_tokens = 6;
    args.sequences.window = 32;
    args.tail.k = args.tail.v = rows(kv, KV_HEADS);
    args.tail.starts = tail_starts;
    args.tail.lengths = tail_lengths;
    args.tail.n_rows = TAIL;

    dq_limits limits = {.struct_size = sizeof limits, .max_streams = 3, .max_queries = 4, .max_kv = 40,
                        .max_total_queries = 6, .max_tail = TAIL};
    uint64_t bytes;
    check(dq_workspace_size(codec, 0, &limits, &bytes));
    void *workspace = aligned_alloc(64, (size_t)(bytes + 63) / 64 * 64);
    check(dq_attend(codec, 0, &args, workspace, bytes, NULL));
    printf("%.4f %.4f %.4f\n", (double)out[0], (double)out[1 * Q_HEADS * DIM], (double)out[5 * Q_HEADS * DIM]);

    dq_codec_destroy(codec);
    dq_context_destroy(context);
    free(workspace);
    free(store.data);
    return 0;
}
