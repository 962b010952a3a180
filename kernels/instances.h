// The kernels that the library carries: one line per head_dim and plans, for keys and values of the same head_dim.
//   DQ_INSTANCE(head_dim, key plan, value plan)
// DQ_INSTANCES_HOT keeps two, for a quick look at registers; DQ_INSTANCES_ALL adds the shapes that few models have; a shape that is not listed is a clear status, not a fallback.
#define DQ_DEFAULT_INSTANCES(X) \
    X(64, 4, 4) X(64, 3, 3) X(64, 4, 3) \
    X(128, 4, 4) X(128, 3, 3) X(128, 4, 3) \
    X(256, 4, 4) X(256, 3, 3) X(256, 4, 3)

#ifdef DQ_INSTANCES_ALL
#define DQ_INSTANCES(X) \
    DQ_DEFAULT_INSTANCES(X) \
    X(64, 2, 2) X(64, 8, 8) X(128, 2, 2) X(128, 8, 8) X(256, 2, 2) X(256, 8, 8) \
    X(80, 4, 4) X(80, 3, 3) X(96, 4, 4) X(96, 3, 3) X(192, 4, 4) X(192, 3, 3)
#elif defined(DQ_INSTANCES_HOT)
#define DQ_INSTANCES(X) X(128, 4, 4) X(128, 3, 3)
#else
#define DQ_INSTANCES(X) DQ_DEFAULT_INSTANCES(X)
#endif
