// The kernels that the library carries: one line per head_dim and plans, for keys and values of the same head_dim.
//   DQ_INSTANCE(head_dim, key plan, value plan)
// DQ_INSTANCES_HOT keeps two, for a quick look at registers; DQ_INSTANCES_ALL adds the shapes that few models have; a
// shape that is not listed is a clear status, not a fallback.
#define DQ_INSTANCES_OF(X, d) X(d, 104, 4) X(d, 103, 3) X(d, 102, 2) X(d, 104, 3) X(d, 4, 4) X(d, 3, 3)
// Some numbers of heads put these off the alignment of the fast loads; attention has a variant `u` of them that reads byte
// pairs.
#define DQ_UNALIGNED_OF(X, d) X(d, 104, 4) X(d, 103, 3) X(d, 102, 2) X(d, 104, 3) X(d, 3, 3)
#define DQ_UNALIGNED_WIDE(X) X(128, 104, 4) X(128, 103, 3) X(128, 102, 2) X(128, 104, 3) X(256, 104, 4) X(256, 103, 3) X(256, 104, 3)

#ifdef DQ_INSTANCES_ALL
#define DQ_INSTANCES(X) \
    DQ_INSTANCES_OF(X, 64) DQ_INSTANCES_OF(X, 80) DQ_INSTANCES_OF(X, 96) DQ_INSTANCES_OF(X, 128) DQ_INSTANCES_OF(X, 192) DQ_INSTANCES_OF(X, 256) \
    X(64, 8, 8) X(80, 8, 8) X(96, 8, 8) X(128, 8, 8) X(192, 8, 8) X(256, 8, 8)
#define DQ_UNALIGNED_INSTANCES(X) DQ_UNALIGNED_OF(X, 64) DQ_INSTANCES_OF(X, 80) DQ_INSTANCES_OF(X, 96) DQ_UNALIGNED_WIDE(X) DQ_UNALIGNED_OF(X, 192)
#elif defined(DQ_INSTANCES_FEW) // for the stand-in driver of the tests
#define DQ_INSTANCES(X) X(64, 104, 4) X(64, 103, 3) X(128, 104, 4)
#define DQ_UNALIGNED_INSTANCES(X) X(64, 104, 4) X(64, 103, 3) X(128, 104, 4)
#elif defined(DQ_INSTANCES_HOT)
#define DQ_INSTANCES(X) X(128, 104, 4) X(128, 103, 3)
#define DQ_UNALIGNED_INSTANCES(X)
#else
#define DQ_INSTANCES(X) DQ_INSTANCES_OF(X, 64) DQ_INSTANCES_OF(X, 128) DQ_INSTANCES_OF(X, 256)
#define DQ_UNALIGNED_INSTANCES(X) DQ_UNALIGNED_OF(X, 64) DQ_UNALIGNED_WIDE(X)
#endif
