// The decode attention suite on the emulator; one thread order per run: ascending, descending or random.
#include "attend_test.cpp"

int main(int argc, char** argv) {
    int order = argc > 1 ? std::atoi(argv[1]) : 0;
    rt::how().order = order == 0 ? emu::Order::Ascending : order == 1 ? emu::Order::Descending : emu::Order::Random;
    rt::how().seed = 7;
    std::mt19937_64 rng(1 + order);
#ifdef DQ_FAST
    all_cases<128, 4, 128, 4>(rng, 0, 3);
    all_cases<128, 4, 128, 4>(rng, 8, 10);
    prefill_cases<128, 4, 128, 4, 3>(rng, 0, 5);
    // Tiers: planes of every width, groups that end early, an odd number of heads.
    all_cases<64, 104, 64, 4>(rng, 1, 4);
    all_cases<64, 103, 64, 3>(rng, 1, 4);
    run<64, 103, 64, 3, 1, false>({"three heads", 3, 3, 1, 1, 70, 2, {2, 1}, {2, 0}, 1, true, 0, false, 0, 3}, rng);
    prefill_cases<128, 104, 128, 4, 3>(rng, 0, 1);
    prefill_cases<64, 103, 64, 3, 3>(rng, 1, 2);
    // The fold takes the matrix in pieces.
    all_cases<256, 103, 256, 3>(rng, 1, 2);
    prefill_cases<256, 103, 256, 3, 2>(rng, 0, 1);
    prefill_cases<256, 103, 256, 3, 2>(rng, 2, 3);
    // Narrow records: the joined results of warps that share a head are larger than their stages.
    run<64, 102, 64, 2, 2, false>({"narrow", 2, 8, 1, 1, 700, 2, {2, 1}, {4, 0}, 1, true, 0, false, 0, 8}, rng);
    run<64, 102, 64, 2, 2, true>({"narrow", 4, 8, 1, 1, 700, 2, {2, 1}, {4, 0}, 1, true, 0, false, 0, 8}, rng);
#else
    const int n = sizeof CASES / sizeof *CASES;
    all_cases<128, 4, 128, 4>(rng, 0, n);
    run<128, 4, 128, 4, 2, true>({"wide group", 2, 7, 1, 1, 70, 2, {2, 1}, {2, 0}, 1, true, 0, false, 0, 4}, rng);
    all_cases<128, 3, 128, 3>(rng, 0, n);
    all_cases<64, 4, 64, 4>(rng, 0, n);
    all_cases<64, 3, 64, 3>(rng, 1, 4);
    all_cases<64, 2, 64, 8>(rng, 1, 4);
    all_cases<128, 8, 128, 2>(rng, 1, 4);
    all_cases<256, 4, 256, 3>(rng, 1, 3);
    all_cases<80, 4, 80, 3>(rng, 1, 4);
    all_cases<96, 3, 96, 4>(rng, 1, 4);
    all_cases<192, 4, 128, 8>(rng, 1, 3);
    prefill_cases<128, 4, 128, 4, 4>(rng, 0, 5);
    prefill_cases<128, 3, 128, 3, 3>(rng, 0, 4);
    prefill_cases<64, 3, 64, 8, 3>(rng, 0, 4);
    prefill_cases<80, 4, 96, 3, 3>(rng, 0, 3);
    prefill_cases<256, 2, 256, 4, 4>(rng, 0, 2);
    prefill_cases<256, 104, 256, 4, 3>(rng, 0, 2);
    all_cases<128, 104, 128, 4>(rng, 0, n);
    all_cases<64, 104, 64, 4>(rng, 1, 4);
    all_cases<64, 103, 64, 3>(rng, 1, 4);
    all_cases<96, 102, 96, 2>(rng, 1, 4);
    all_cases<256, 103, 256, 3>(rng, 1, 3);
    prefill_cases<128, 104, 128, 4, 3>(rng, 0, 4);
    prefill_cases<64, 103, 64, 3, 3>(rng, 0, 4);
    // The fold takes the matrix in three pieces, whose places change from round to round.
    prefill_cases<192, 4, 192, 3, 2>(rng, 0, 2);
    rng.seed(10 + order);
    all_cases<80, 4, 80, 3>(rng, 0, 4, TAIL_CASES);
    all_cases<256, 4, 256, 3>(rng, 0, 4, TAIL_CASES);
#endif
    rng.seed(30 + order);
    prefill_cases<128, 4, 128, 4, 3>(rng, 5, 10);
    prefill_cases<64, 4, 64, 4, 16>(rng, 10, 11);
    prefill_cases<128, 4, 128, 4, 3>(rng, 11, 12);
    prefill_cases<64, 103, 64, 3, 3>(rng, 12, 16);
    prefill_cases<256, 4, 256, 4, 4>(rng, 12, 13);
    prefill_cases<128, 4, 128, 4, 12>(rng, 16, 17);
    prefill_cases<256, 4, 256, 4, 8>(rng, 17, 18);
    rng.seed(20 + order);
    all_cases<128, 4, 128, 4>(rng, 0, 4, TAIL_CASES);
    prefill_cases<128, 4, 128, 4, 3>(rng, 4, 5, TAIL_CASES);
    // More splits than a warp of merge loads at a time; the last one has no keys.
    run<128, 4, 128, 4, 1, true>({"many splits", 2, 4, 1, 1, 460, 16, {1, 0}, {2, 0}, 0, true, 0, false, 0, 2}, rng);
    // And than one of many rows does.
    run<128, 4, 128, 4, 4, true, 3>({"chunk of three parts", 2, 4, 1, 9, 300, 3, {1, 0}, {2, 0}, 0, true, 0, false, 0, 2}, rng);
    return rt::report("attend on the emulator");
}
