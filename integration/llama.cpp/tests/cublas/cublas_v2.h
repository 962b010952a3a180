// As much of cuBLAS as ggml-cuda.cu names. For compiling it where the CUDA compiler is and cuBLAS is not: see test.sh.
#pragma once

#include <cuda_runtime.h>

#define CUBLAS_VER_MAJOR 13
#define CUBLAS_VER_MINOR 0

typedef struct cublasContext *cublasHandle_t;

enum cublasStatus_t {
    CUBLAS_STATUS_SUCCESS,
    CUBLAS_STATUS_NOT_INITIALIZED,
    CUBLAS_STATUS_ALLOC_FAILED,
    CUBLAS_STATUS_INVALID_VALUE,
    CUBLAS_STATUS_ARCH_MISMATCH,
    CUBLAS_STATUS_MAPPING_ERROR,
    CUBLAS_STATUS_EXECUTION_FAILED,
    CUBLAS_STATUS_INTERNAL_ERROR,
    CUBLAS_STATUS_NOT_SUPPORTED,
};
enum cublasOperation_t { CUBLAS_OP_N, CUBLAS_OP_T };
enum cublasMath_t { CUBLAS_TF32_TENSOR_OP_MATH };
enum cublasComputeType_t { CUBLAS_COMPUTE_16F, CUBLAS_COMPUTE_32F };
enum cublasGemmAlgo_t { CUBLAS_GEMM_DEFAULT_TENSOR_OP };

// any arguments: ggml's own calls are not what is checked
template<typename... T> cublasStatus_t cublasCreate(T...);
template<typename... T> cublasStatus_t cublasDestroy(T...);
template<typename... T> cublasStatus_t cublasSetMathMode(T...);
template<typename... T> cublasStatus_t cublasSetStream(T...);
template<typename... T> cublasStatus_t cublasSetWorkspace(T...);
template<typename... T> cublasStatus_t cublasSgemm(T...);
template<typename... T> cublasStatus_t cublasGemmEx(T...);
template<typename... T> cublasStatus_t cublasGemmBatchedEx(T...);
template<typename... T> cublasStatus_t cublasGemmStridedBatchedEx(T...);
template<typename... T> cublasStatus_t cublasLoggerConfigure(T...);
const char *cublasGetStatusString(cublasStatus_t);
