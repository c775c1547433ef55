/* Products of a sparse float32 matrix in CSR form with dense vectors.
 *
 * Row m of the result, columns 0 <= t < n:
 *     y[m, t] = act( bias[m] + sum over the entries j of row m of  val[j] * x[place(col[j]) + t] )
 * place(k) is where row k of the dense operand begins. For a matrix it is k times its row stride; for a convolution of stride 1 on a
 * padded image a table holds the offsets of the taps (c, r, s), so that no patch matrix is ever written.
 *
 * A tile of up to WIDEST columns stays in registers for a row's part of a block, which makes every entry one load and one multiply-add per
 * vector.
 * x must be readable up to 15 floats behind the last column that is used.
 *
 * Built without the compiler's own vectoriser: it turns the loops over scattered entries into permutations that take longer.
 */
#include <stdint.h>
#include <string.h>

/* Floats per vector, and how many tiles are narrower than one. */
#if defined(__AVX512F__)
#define LANES 16
#define NARROW 2
#elif defined(__AVX__)
#define LANES 8
#define NARROW 1
#else
#define LANES 4
#define NARROW 0
#endif
#define WIDEST (8 * LANES)
#define CHUNK 64 /* rows that share a block of the dense operand */

/* Loads and stores go through these types, not through memcpy, which some compilers build of smaller pieces by way of the stack. */
#define VECTOR(BYTES) __attribute__((vector_size(BYTES), aligned(4), may_alias))
typedef float vec VECTOR(4 * LANES);

/* Entries come in fours and eights, so a core asks for few cache lines at a time by itself; the entries AHEAD are asked for once per 16, and
 * the first PART of the next row's share of a block before this row's. Addresses behind the end do no harm. */
#define AHEAD 256
#define PART 64
#define ASK(p) __builtin_prefetch((const void *)((uintptr_t)(p) + AHEAD * sizeof *(p)))

#define ENTRY(VEC, NV, U, J, PLACE)                                                                                          \
    {                                                                                                                        \
        const float a = val[J];                                                                                              \
        const int32_t c = at[J];                                                                                             \
        const float *row = x + (PLACE);                                                                                      \
        _Pragma("GCC unroll 8") for (int i = 0; i < NV; i++) sum[U][i] += a * ((const VEC *)row)[i];                         \
    }

/* The sparse matrix's entries and the dense operand of one tile. */
struct operand {
    const void *col;
    const float *val, *x;
    const int32_t *place;
    int64_t step;
};

/* NV vectors of columns, US entries in flight: NV * US independent sums hide the latency of the multiply-add. Takes a row's entries from
 * *cursor on until one's column reaches `limit`; without y, what they add up to stays in `acc`, which holds it already unless `first`. */
#define TILE(NAME, COL, VEC, NV, US, PLACE)                                                                                  \
    static void NAME(const struct operand *o, int32_t *cursor, int32_t to, int32_t limit, float *acc, int first, float *y,   \
                     int64_t count, float bias, int relu)                                                                    \
    {                                                                                                                        \
        const COL *at = o->col;                                                                                              \
        const float *val = o->val, *x = o->x;                                                                                \
        const int32_t *place = o->place;                                                                                     \
        const int64_t step = o->step;                                                                                        \
        (void)place;                                                                                                         \
        (void)step;                                                                                                          \
        enum { L = sizeof(VEC) / sizeof(float) };                                                                            \
        VEC sum[US][NV];                                                                                                     \
        for (int u = 0; u < US; u++)                                                                                         \
            for (int i = 0; i < NV; i++) sum[u][i] = (VEC){0};                                                               \
        if (!first) _Pragma("GCC unroll 8") for (int i = 0; i < NV; i++) sum[0][i] = ((const VEC *)acc)[i];                  \
        int32_t j = *cursor;                                                                                                 \
        for (; to - j >= 16 && at[j + 15] < limit; j += 16) {                                                                \
            ASK(val + j);                                                                                                    \
            ASK(at + j);                                                                                                     \
            for (int k = 0; k < 16; k += US) _Pragma("GCC unroll 8") for (int u = 0; u < US; u++) ENTRY(VEC, NV, u, j + k + u, PLACE) \
        }                                                                                                                    \
        for (; to - j >= US && at[j + US - 1] < limit; j += US)                                                              \
            _Pragma("GCC unroll 8") for (int u = 0; u < US; u++) ENTRY(VEC, NV, u, j + u, PLACE)                             \
        for (; j < to && at[j] < limit; j++) ENTRY(VEC, NV, 0, j, PLACE)                                                     \
        *cursor = j;                                                                                                         \
        for (int u = 1; u < US; u++)                                                                                         \
            for (int i = 0; i < NV; i++) sum[0][i] += sum[u][i];                                                             \
        if (!y) {                                                                                                            \
            _Pragma("GCC unroll 8") for (int i = 0; i < NV; i++) ((VEC *)acc)[i] = sum[0][i];                                \
            return;                                                                                                          \
        }                                                                                                                    \
        const VEC zero = {0};                                                                                                \
        _Pragma("GCC unroll 8") for (int i = 0; i < NV; i++) {                                                               \
            VEC v = sum[0][i] + bias;                                                                                        \
            __typeof__(v <= zero) negative = v <= zero;                                                                      \
            if (relu) v = (VEC)((__typeof__(negative))v & ~negative);                                                        \
            const int64_t left = count - i * L;                                                                              \
            if (left >= L) ((VEC *)y)[i] = v;                                                                                \
            else if (left > 0) memcpy(y + i * L, &v, (size_t)left * sizeof(float));                                          \
        }                                                                                                                    \
    }

/* Rows at equal distances, and rows at the places of a table; columns in 16 bits, and in 32. */
#define ALL(NAME, VEC, NV, US)                                                                                               \
    TILE(NAME##_even_16, int16_t, VEC, NV, US, c * step)                                                                     \
    TILE(NAME##_even_32, int32_t, VEC, NV, US, c * step)                                                                     \
    TILE(NAME##_placed_16, int16_t, VEC, NV, US, place[c])                                                                   \
    TILE(NAME##_placed_32, int32_t, VEC, NV, US, place[c])

#if NARROW > 0
typedef float vec4 VECTOR(16);
ALL(tile_4, vec4, 1, 8)
#define NAMES_4(KIND) tile_4##KIND,
#else
#define NAMES_4(KIND)
#endif
#if NARROW > 1
typedef float vec8 VECTOR(32);
ALL(tile_8, vec8, 1, 8)
#define NAMES_8(KIND) tile_8##KIND,
#else
#define NAMES_8(KIND)
#endif
ALL(tile1, vec, 1, 8)
ALL(tile2, vec, 2, 4)
ALL(tile3, vec, 3, 4)
ALL(tile4, vec, 4, 2)
ALL(tile5, vec, 5, 2)
ALL(tile6, vec, 6, 2)
ALL(tile7, vec, 7, 2)
#ifdef __AVX512F__
ALL(tile8, vec, 8, 2)
#else /* x86 has sixteen registers in all */
ALL(tile8, vec, 8, 1)
#endif

typedef void (*tile_function)(const struct operand *, int32_t *, int32_t, int32_t, float *, int, float *, int64_t, float, int);
#define NAMES(KIND)                                                                                                          \
    {                                                                                                                        \
        NAMES_4(KIND) NAMES_8(KIND) tile1##KIND, tile2##KIND, tile3##KIND, tile4##KIND, tile5##KIND, tile6##KIND,            \
            tile7##KIND, tile8##KIND                                                                                         \
    }
/* [by a table][in 32 bits][width] */
static const tile_function TILES[2][2][NARROW + 8] = {{NAMES(_even_16), NAMES(_even_32)}, {NAMES(_placed_16), NAMES(_placed_32)}};

/* The widest tile in columns. */
int csr_widest(void) { return WIDEST; }

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

/* Asks for the first entries of a part of a row, which ASK would come too late for. */
static inline void fetch(const float *val, const void *col, int bits32, int64_t j)
{
    const char *at = (const char *)col + j * (bits32 ? 4 : 2);
    for (int i = 0; i < PART; i += 16) __builtin_prefetch((const void *)((uintptr_t)(val + j) + (uintptr_t)i * 4));
    for (int i = 0; i < PART * (bits32 ? 4 : 2); i += 64) __builtin_prefetch((const void *)((uintptr_t)at + (uintptr_t)i));
}

/* `images` dense operands of `columns` rows, x_step apart, n columns each, results y_step apart. The operand's rows begin at the offsets in
 * `place`, or without one at multiples of n. `col` holds int32_t where `bits32` is set, else int16_t. The columns are lines of `pitch`, of
 * which the first `wanted` are written; `width` (a multiple of LANES, at most WIDEST) is the tile that is kept in registers. Up to CHUNK rows
 * of the result go through the operand together, `block` of its rows at a time, which so stay in the first-level cache. Columns that do
 * not ascend cost time, not correctness: the last block takes every entry that is left. */
void csr_images(int64_t images, int64_t rows, int64_t columns, int64_t n, const int32_t *crow, const void *col, int bits32,
                const float *val, const int32_t *place, const float *x, int64_t x_step, float *y, int64_t y_step, int64_t ldy, int64_t pitch,
                int64_t wanted, const float *bias, int relu, int64_t width, int64_t block, int threads)
{
    const int64_t tiles = (n + width - 1) / width;
    int64_t chunk = CHUNK;
    while (threads > 1 && chunk > 8 && images * tiles * ((rows + chunk - 1) / chunk) < 4 * threads) chunk /= 2;
    const int64_t chunks = (rows + chunk - 1) / chunk;
#pragma omp parallel for collapse(3) schedule(dynamic) num_threads(threads) if (threads > 1)
    for (int64_t b = 0; b < images; b++)
        for (int64_t t = 0; t < tiles; t++)
            for (int64_t c = 0; c < chunks; c++) {
                const int64_t first = t * width, count = n - first < width ? n - first : width;
                const int64_t narrow = count <= 4 ? 0 : count <= 8 ? 1 : 2;
                const int64_t index = narrow < NARROW ? narrow : NARROW + (count - 1) / LANES;
                const tile_function tile = TILES[place != 0][bits32 != 0][index];
                const struct operand o = {col, val, x + b * x_step + first, place, n};
                const int64_t top = c * chunk, high = rows - top < chunk ? rows - top : chunk;
                float acc[CHUNK][WIDEST], part[WIDEST];
                int32_t cursor[CHUNK];
                memcpy(cursor, crow + top, (size_t)high * sizeof *cursor);
                for (int64_t k = 0; k == 0 || k < columns; k += block) {
                    const int last = k + block >= columns;
                    const int32_t limit = last ? INT32_MAX : (int32_t)(k + block);
                    for (int64_t i = 0; i < high; i++) {
                        const int64_t m = top + i;
                        if (block < columns && i + 1 < high) fetch(val, col, bits32, cursor[i + 1]);
                        float *line = y + b * y_step + m * ldy;
                        float *to = !last ? 0 : pitch == wanted ? line + first : part;
                        tile(&o, cursor + i, crow[m + 1], limit, acc[i], k == 0, to, count, bias ? bias[m] : 0.0f, relu);
                        if (to == part) spread(line, part, first, count, pitch, wanted);
                    }
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

/* Convolution of `images` images without a patch matrix; scratch holds one image in phases plus 16 floats. size: output height and
 * width. */
void csr_convolve(int64_t images, int64_t rows, int64_t columns, const int64_t *shape, const int64_t *size, const int64_t *stride,
                  const int64_t *padding, const int32_t *crow, const void *col, int bits32, const float *val, const int32_t *place,
                  const float *x, float *scratch, float *y, const float *bias, int relu, int64_t width, int64_t block, int threads)
{
    const int64_t channels = shape[0], height = shape[1], across = shape[2], high = shape[3], wide = shape[4];
    for (int64_t b = 0; b < images; b++) {
        split(x + b * channels * height * across, scratch, channels, height, across, high, wide, stride, padding);
        csr_images(1, rows, columns, (size[0] - 1) * wide + size[1], crow, col, bits32, val, place, scratch, 0,
                   y + b * rows * size[0] * size[1], 0, size[0] * size[1], wide, size[1], bias, relu, width, block, threads);
    }
}

/* One column: a single chain of multiply-adds would wait four cycles per entry, eight chains do not. */
#define ROW(NAME, COL)                                                                                                       \
    static float NAME(int32_t j, int32_t to, const void *col, const float *val, const float *x)                             \
    {                                                                                                                        \
        const COL *at = col;                                                                                                 \
        float sum[8] = {0};                                                                                                  \
        for (; to - j >= 16; j += 16) {                                                                                      \
            ASK(val + j);                                                                                                    \
            ASK(at + j);                                                                                                     \
            _Pragma("GCC unroll 16") for (int u = 0; u < 16; u++) sum[u % 8] += val[j + u] * x[at[j + u]];                   \
        }                                                                                                                    \
        for (; to - j >= 4; j += 4) _Pragma("GCC unroll 4") for (int u = 0; u < 4; u++) sum[u] += val[j + u] * x[at[j + u]]; \
        for (; j < to; j++) sum[0] += val[j] * x[at[j]];                                                                     \
        return ((sum[0] + sum[1]) + (sum[2] + sum[3])) + ((sum[4] + sum[5]) + (sum[6] + sum[7]));                            \
    }

ROW(row_16, int16_t)
ROW(row_32, int32_t)

void csr_vector(int64_t rows, const int32_t *crow, const void *col, int bits32, const float *val, const float *x, float *y,
                const float *bias, int relu, int threads)
{
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t m = 0; m < rows; m++) {
        const float total = (bits32 ? row_32 : row_16)(crow[m], crow[m + 1], col, val, x) + (bias ? bias[m] : 0.0f);
        y[m] = relu && total <= 0.0f ? 0.0f : total;
    }
}
