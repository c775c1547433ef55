/* Products of a sparse float32 matrix in CSR form with dense vectors.
 *
 * Row m of the result, columns 0 <= t < n:
 *     y[m, t] = act( bias[m] + sum over the entries j of row m of  val[j] * x[place[col[j]] + t] )
 * place[k] is the offset of row k of the dense operand. For a matrix it is k times its row stride; for a convolution of stride 1 on a
 * padded image it is the offset of tap (c, r, s), so that no patch matrix is ever written.
 *
 * A tile of up to 128 columns stays in registers for a whole row, which makes every entry one load and one multiply-add per 16 columns.
 * x must be readable up to 15 floats behind the last column that is used.
 */
#include <stdint.h>
#include <string.h>

typedef float vec __attribute__((vector_size(64), aligned(4)));
typedef int32_t mask __attribute__((vector_size(64), aligned(4)));
#define LANES 16

static inline vec load(const float *p) { vec v; memcpy(&v, p, sizeof v); return v; }

static inline void put(float *y, vec v, int64_t count)
{
    if (count >= LANES) memcpy(y, &v, sizeof v);
    else if (count > 0) memcpy(y, &v, (size_t)count * sizeof(float));
}

static inline vec finish(vec v, float bias, int relu)
{
    v += bias;
    if (relu) {
        const vec zero = {0};
        v = (vec)((mask)v & ~(mask)(v <= zero));
    }
    return v;
}

/* NV vectors of columns, US entries in flight: NV * US independent sums hide the latency of the multiply-add. */
#define TILE(NAME, NV, US)                                                                                                   \
    static void NAME(int32_t from, int32_t to, const int32_t *col, const float *val, const int32_t *place, const float *x,   \
                     float *y, int64_t count, float bias, int relu)                                                         \
    {                                                                                                                        \
        vec sum[US][NV];                                                                                                     \
        for (int u = 0; u < US; u++)                                                                                         \
            for (int i = 0; i < NV; i++) sum[u][i] = (vec){0};                                                               \
        int32_t j = from;                                                                                                    \
        for (; j + US <= to; j += US)                                                                                        \
            _Pragma("GCC unroll 8") for (int u = 0; u < US; u++) {                                                           \
                const float a = val[j + u];                                                                                  \
                const float *row = x + place[col[j + u]];                                                                    \
                _Pragma("GCC unroll 8") for (int i = 0; i < NV; i++) sum[u][i] += a * load(row + i * LANES);                 \
            }                                                                                                                \
        for (; j < to; j++) {                                                                                                \
            const float a = val[j];                                                                                          \
            const float *row = x + place[col[j]];                                                                            \
            _Pragma("GCC unroll 8") for (int i = 0; i < NV; i++) sum[0][i] += a * load(row + i * LANES);                     \
        }                                                                                                                    \
        for (int u = 1; u < US; u++)                                                                                         \
            for (int i = 0; i < NV; i++) sum[0][i] += sum[u][i];                                                             \
        for (int i = 0; i < NV; i++) put(y + i * LANES, finish(sum[0][i], bias, relu), count - i * LANES);                   \
    }

TILE(tile16, 1, 8)
TILE(tile32, 2, 4)
TILE(tile48, 3, 3)
TILE(tile64, 4, 2)
TILE(tile80, 5, 2)
TILE(tile96, 6, 2)
TILE(tile112, 7, 2)
TILE(tile128, 8, 2)

typedef void (*tile_function)(int32_t, int32_t, const int32_t *, const float *, const int32_t *, const float *, float *, int64_t, float,
              int);
static const tile_function TILES[8] = {tile16, tile32, tile48, tile64, tile80, tile96, tile112, tile128};

/* Moves columns first .. first + count of a row of `pitch` wide lines to lines of `wanted` columns, dropping what lies behind. */
static void spread(float *y, const float *from, int64_t first, int64_t count, int64_t pitch, int64_t wanted)
{
    while (count > 0) {
        const int64_t line = first / pitch, at = first % pitch, left = pitch - at < count ? pitch - at : count;
        const int64_t useful = at < wanted ? (wanted - at < left ? wanted - at : left) : 0;
        if (useful > 0) memcpy(y + line * wanted + at, from, (size_t)useful * sizeof(float));
        first += left;
        from += left;
        count -= left;
    }
}

/* `images` dense operands x_step apart, n columns each, results y_step apart. The columns are lines of `pitch`, of which the first
 * `wanted` are written; `width` (a multiple of 16, at most 128) is the tile that is kept in registers. */
void csr_images(int64_t images, int64_t rows, int64_t n, const int32_t *crow, const int32_t *col, const float *val, const int32_t *place,
                const float *x, int64_t x_step, float *y, int64_t y_step, int64_t ldy, int64_t pitch, int64_t wanted, const float *bias,
                int relu, int64_t width, int threads)
{
    const int64_t tiles = (n + width - 1) / width;
#pragma omp parallel for collapse(3) schedule(dynamic, 16) num_threads(threads) if (threads > 1)
    for (int64_t b = 0; b < images; b++)
        for (int64_t t = 0; t < tiles; t++)
            for (int64_t m = 0; m < rows; m++) {
                const int64_t first = t * width, count = n - first < width ? n - first : width;
                const tile_function tile = TILES[(count + LANES - 1) / LANES - 1];
                const float *from = x + b * x_step + first;
                float *to = y + b * y_step + m * ldy, part[128];
                const float offset = bias ? bias[m] : 0.0f;
                if (pitch == wanted) tile(crow[m], crow[m + 1], col, val, place, from, to + first, count, offset, relu);
                else {
                    tile(crow[m], crow[m + 1], col, val, place, from, part, count, offset, relu);
                    spread(to, part, first, count, pitch, wanted);
                }
            }
}

/* Copies an image [channels, height, width] with zero borders into phases: pixel (h, w) of the padded image goes to phase
 * (h % sh) * sw + w % sw, place (h / sh, w / sw), so that every tap of a strided convolution is a plain offset into [channels, sh * sw,
 * high, wide]. */
static void split(const float *x, float *to, int64_t channels, int64_t height, int64_t width, int64_t high, int64_t wide,
                  const int64_t *stride, const int64_t *padding)
{
    const int64_t sh = stride[0], sw = stride[1];
    memset(to, 0, (size_t)(channels * sh * sw * high * wide) * sizeof(float));
    for (int64_t c = 0; c < channels; c++)
        for (int64_t h = 0; h < height; h++) {
            const int64_t line = h + padding[0];
            const float *from = x + (c * height + h) * width;
            float *block = to + ((c * sh + line % sh) * sw * high + line / sh) * wide;
            if (sw == 1) memcpy(block + padding[1], from, (size_t)width * sizeof(float));
            else
                for (int64_t w = 0; w < sw && w < width; w++) {
                    const int64_t at = w + padding[1];
                    float *first = block + (at % sw) * high * wide + at / sw;
                    for (int64_t i = 0; w + i * sw < width; i++) first[i] = from[w + i * sw];
                }
        }
}

/* Convolution of `images` images without a patch matrix; scratch holds one image in phases plus 16 floats. size: output height and width.
 * */
void csr_convolve(int64_t images, int64_t rows, const int64_t *shape, const int64_t *size, const int64_t *stride, const int64_t *padding,
                  const int32_t *crow, const int32_t *col, const float *val, const int32_t *place, const float *x, float *scratch, float *y,
                  const float *bias, int relu, int64_t width, int threads)
{
    const int64_t channels = shape[0], height = shape[1], across = shape[2], high = shape[3], wide = shape[4];
    for (int64_t b = 0; b < images; b++) {
        split(x + b * channels * height * across, scratch, channels, height, across, high, wide, stride, padding);
        csr_images(1, rows, (size[0] - 1) * wide + size[1], crow, col, val, place, scratch, 0, y + b * rows * size[0] * size[1], 0,
                   size[0] * size[1], wide, size[1], bias, relu, width, threads);
    }
}

/* One column: a single chain of multiply-adds would wait four cycles per entry, eight chains do not. */
void csr_vector(int64_t rows, const int32_t *crow, const int32_t *col, const float *val, const float *x, float *y, const float *bias,
                int relu,
                int threads)
{
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t m = 0; m < rows; m++) {
        float sum[8] = {0};
        int32_t j = crow[m];
        const int32_t to = crow[m + 1];
        for (; j + 8 <= to; j += 8)
            _Pragma("GCC unroll 8") for (int u = 0; u < 8; u++) sum[u] += val[j + u] * x[col[j + u]];
        for (; j < to; j++) sum[0] += val[j] * x[col[j]];
        float total = ((sum[0] + sum[1]) + (sum[2] + sum[3])) + ((sum[4] + sum[5]) + (sum[6] + sum[7])) + (bias ? bias[m] : 0.0f);
        y[m] = relu && total <= 0.0f ? 0.0f : total;
    }
}
