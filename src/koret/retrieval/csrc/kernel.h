/* What koret.retrieval.compiled calls: attention within each of many texts, norms, GELU and dropout,
 * forward and backward.
 *
 * T tokens of N texts stand one behind the other. Each has 3 H heads of D numbers, those of its query, its key and its
 * value: the output of one projection. A unit of work is one head of one text. */

#ifndef KORET_KERNEL_H
#define KORET_KERNEL_H

#include <stddef.h>
#include <stdint.h>

/* Of a function that is compiled for the processor that TARGET names. */
#define INLINE static inline __attribute__((always_inline)) TARGET

typedef struct {
    const void *qkv;      /* (T, 3, H, D) */
    const void *gradient; /* (T, H, D) of the output; NULL: forward */
    void *result;         /* (T, H, D) the output, or (T, 3, H, D) the gradient of qkv */
    const int *bounds;    /* (N + 1) where each text begins, and where the last ends */
    long heads, size, longest, units;
} Task;

/* What a pass over numbers reads and writes, from address to address; a kernel takes some of it. */
typedef struct {
    void *x, *y;
    void *kept; /* slopes, or a bit for each place */
    uint64_t seed;
    uint32_t least;
    float factor;
} Numbers;

typedef void Pass(const Numbers *, long first, long count);

/* Rows of `width` numbers before and behind a norm, and gradients of them. What may be NULL is left out. */
typedef struct {
    const void *x, *other; /* the row is x + other; other may be NULL */
    void *total;           /* that sum, where there is another */
    void *y;               /* the norm of the row; the gradient of the row, maybe in place of x */
    float *statistics;     /* mean and 1 / deviation of every row */
    const float *weight, *bias;
    const void *added[2];  /* of the norm: gradients beside x, each may be NULL */
    long width;
    float epsilon; /* less than 0: the statistics are given */
} Rows;

typedef void RowPass(const Rows *, long first, long count);

typedef struct {
    const char *name;                              /* the type of the numbers and what the processor has to have */
    int (*is_supported)(void);                     /* by this processor */
    size_t (*count_bytes)(const Task *);           /* of memory for one unit at a time */
    void (*run)(const Task *, long unit, void *memory); /* forward or backward; memory in lines of 64 bytes */
    size_t slope_bytes;                            /* of one slope of GELU, in the form that it is kept in */
    Pass *activate;                                /* x -> GELU of x in y, maybe the same place, and its slopes */
    Pass *descend;                                 /* x -> x times the slopes, in y */
    Pass *draw;                                    /* whether the draw of each place is not less than least, in bits */
    Pass *drop;                                    /* x -> x times factor, or 0 where the bit is not set, in y */
    RowPass *normalize;                            /* x (+ other) -> total, statistics, y */
    RowPass *descend_norm;                         /* x + added, gradients of y -> gradients of total, in y */
} Kernel;

#if defined(__x86_64__) && defined(__GNUC__)
#define KORET_HAS_KERNELS
extern const Kernel koret_bfloat16_avx512, koret_float32_avx512, koret_float32_avx2;
#endif

#endif
