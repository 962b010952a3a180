//! Sizes and offsets of every struct are those that C and C++ assert: `cpp_tests/abi/layout.inc`.

use std::collections::BTreeSet;
use std::mem::offset_of;

use super::types::*;

macro_rules! layout {
    ($($t:ident { $($field:ident)* })*) => {{
        let mut lines = BTreeSet::new();
        $(
            lines.insert(format!("SIZE({}, {});", stringify!($t), size_of::<$t>()));
            $(lines.insert(format!("FIELD({}, {}, {});", stringify!($t), stringify!($field), offset_of!($t, $field)));)*
        )*
        lines
    }};
}

#[test]
fn layouts_are_those_of_c() {
    let ours = layout! {
        dq_context_desc { backend device reserved }
        dq_layer_desc { n_q_heads n_kv_heads head_dim_k head_dim_v k_plan v_plan k_gauge v_gauge }
        dq_codec_desc { n_layers layers max_fits flags fingerprint }
        dq_layout { alignment slot_bytes k_codes_offset v_codes_offset k_headers_offset v_headers_offset max_factor_bytes
            bits_per_value bits_per_value_with_factors }
        dq_layer_info { k_sets v_sets frozen rows_seen factor_bytes moment_bytes rows_to_fit }
        dq_tensor { data dtype reserved token_stride head_stride }
        dq_store { data n_slots slot_stride }
        dq_tokens { n_tokens q k v positions slots store replaced_rows }
        dq_mask { data dtype reserved query_stride stream_stride }
        dq_attend_args { n_streams n_q n_kv first_slot stream_slots store q out mask sink_logits scale softcap sequences tail }
        dq_sequences { q_starts kv_lengths block_table table_stride block_slots n_tokens visible window }
        dq_tail { k v starts lengths n_rows reserved }
        dq_limits { max_tokens max_streams max_queries max_kv max_total_queries max_tail }
    };
    let theirs: BTreeSet<String> = include_str!("../../cpp_tests/abi/layout.inc")
        .lines()
        .filter(|line| line.starts_with("SIZE") || line.starts_with("FIELD"))
        .map(String::from)
        .collect();
    assert_eq!(ours, theirs);
}
