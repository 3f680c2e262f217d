/* Every kernel on texts of random lengths, each array alone in memory of exactly its size: built with the compiler's
 * sanitizers by test_compiled.py, which stop at the first byte that is read or written beside them. */

#include "kernel.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MOST = 4 /* texts */, SIZES = 7 };

static void *
draw(long count, int bytes)
{
    char *numbers = malloc(count * bytes);
    for (long i = 0; i < count; i++) {
        const float x = rand() / (float)RAND_MAX - 0.5f;
        memcpy(numbers + i * bytes, (const char *)&x + 4 - bytes, bytes); /* bfloat16 is the upper half of float32 */
    }
    return numbers;
}

static void
attend(const Kernel *kernel, int bytes, int size, int most)
{
    const int heads = 1 + rand() % 3, texts = 1 + rand() % MOST;
    int *bounds = calloc(texts + 1, sizeof(int));
    long longest = 0;
    for (int t = 0; t < texts; t++) {
        const int length = 1 + rand() % most;
        bounds[t + 1] = bounds[t] + length;
        longest = length > longest ? length : longest;
    }
    const long count = (long)bounds[texts] * heads * size, units = (long)texts * heads;
    void *qkv = draw(3 * count, bytes), *gradient = draw(count, bytes);
    for (int backward = 0; backward < 2; backward++) {
        void *result = malloc((backward ? 3 : 1) * count * bytes);
        const Task task = {qkv, backward ? gradient : NULL, result, bounds, heads, size, longest, units};
        const size_t needed = (kernel->count_bytes(&task) + 63) / 64 * 64;
        void *memory = aligned_alloc(64, needed);
        memset(memory, 0xff, needed); /* NaN: what is read before it was written shows */
        for (long unit = 0; unit < units; unit++)
            kernel->run(&task, unit, memory);
        for (long i = 0; i < (backward ? 3 : 1) * count; i++) {
            unsigned bits = 0;
            memcpy((char *)&bits + 4 - bytes, (char *)result + i * bytes, bytes);
            if ((bits & 0x7f800000) == 0x7f800000) {
                printf("%s: not a number\n", kernel->name);
                exit(1);
            }
        }
        free(memory);
        free(result);
    }
    free(qkv);
    free(gradient);
    free(bounds);
}

int
main(void)
{
    const Kernel *kernels[] = {&koret_bfloat16_avx512, &koret_float32_avx512, &koret_float32_avx2};
    const int sizes[SIZES] = {16, 32, 48, 64, 80, 112, 256};
    for (int k = 0; k < 3; k++) {
        const int bytes = kernels[k]->name[0] == 'b' ? 2 : 4;
        if (!kernels[k]->is_supported())
            continue;
        for (int s = 0; s < SIZES; s++)
            for (int i = 0; i < 6; i++)
                attend(kernels[k], bytes, sizes[s], i < 3 ? 40 : 150);
        for (long count = 0; count < 300; count++) {
            void *x = draw(count, bytes), *y = malloc(count * bytes);
            void *slopes = malloc(count * kernels[k]->slope_bytes), *bits = malloc((count + 127) / 128 * 16);
            Numbers all = {x, y, slopes, 7, 9000, 1.5f};
            kernels[k]->activate(&all, 0, count);
            kernels[k]->descend(&all, 0, count);
            all.y = x;
            kernels[k]->activate(&all, 0, count);
            all.kept = bits;
            kernels[k]->draw(&all, 0, count);
            kernels[k]->drop(&all, 0, count);
            free(x);
            free(y);
            free(slopes);
            free(bits);
        }
        for (long width = 16; width <= 400; width += 48)
            for (long rows = 0; rows < 5; rows++) {
                const long count = rows * width;
                void *x = draw(count, bytes), *other = draw(count, bytes), *y = malloc(count * bytes);
                void *total = malloc(count * bytes);
                float *norm = draw(2 * width, sizeof(float)), *statistics = malloc(2 * rows * sizeof(float));
                Rows all = {x, other, total, y, statistics, norm, norm + width, {NULL, NULL}, width, 1e-5f};
                kernels[k]->normalize(&all, 0, rows);
                all = (Rows){total, NULL, NULL, y, statistics, norm, norm + width, {NULL, NULL}, width, -1};
                kernels[k]->normalize(&all, 0, rows);
                all = (Rows){x, NULL, total, x, statistics, norm, NULL, {other, y}, width, 0};
                kernels[k]->descend_norm(&all, 0, rows);
                all = (Rows){x, NULL, NULL, y, NULL, NULL, NULL, {NULL, other}, width, 0};
                kernels[k]->descend_norm(&all, 0, rows);
                free(x);
                free(other);
                free(y);
                free(total);
                free(norm);
                free(statistics);
            }
        printf("%s\n", kernels[k]->name);
    }
    return 0;
}
