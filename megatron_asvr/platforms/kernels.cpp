// Kernels for the CPU, built and called by kernels.py. What they do stands with their callers.
//
// Rows, or positions, are computed one by one in fp32 and in a fixed order, so the number of
// threads changes no bit. Comparisons are written so that what is not a number stays visible.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

namespace {

struct Bf16 {
    uint16_t bits;
};

inline float read(float x) { return x; }

inline float read(Bf16 x) {
    const uint32_t bits = uint32_t(x.bits) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline void write(float x, float* to) { *to = x; }

inline uint16_t rounded(float x) {  // to nearest, ties to even
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    const uint32_t whole = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return uint16_t((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : whole);
}

inline void write(float x, Bf16* to) { to->bits = rounded(x); }

// exp(x) for x <= 0 within 2 units in the last place; 0 where it is no normal number.
// x = n log(2) + r; the polynomial is the Taylor series of exp on |r| <= log(2) / 2.
inline float exp_negative(float x) {
    const float magic = 12582912.f;  // 1.5 * 2^23: adding it rounds to a whole number
    const float shifted = x * 1.44269504f + magic;
    const float n = shifted - magic;
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // log(2) in two parts
    float p = 1.f / 5040;
    p = p * r + 1.f / 720;
    p = p * r + 1.f / 120;
    p = p * r + 1.f / 24;
    p = p * r + 1.f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.f;
    p = p * r + 1.f;
    uint32_t bits;
    std::memcpy(&bits, &shifted, sizeof bits);
    bits = (bits + 127) << 23;
    float power;
    std::memcpy(&power, &bits, sizeof power);
    return x < -87.f ? 0.f : p * power;
}

inline float dot(const float* a, const float* b, int64_t size) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < size; ++i) sum += a[i] * b[i];
    return sum;
}

inline void add(float* to, float factor, const float* x, int64_t size) {
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) to[i] += factor * x[i];
}

// Attention over the depths of one position and head.
struct Head {
    int64_t depth, width;
    std::vector<float> q, k, v, p;

    Head(int64_t depth, int64_t width)
        : depth(depth), width(width), q(depth * width), k(q), v(q), p(depth * depth) {}

    template <typename T>
    void fetch(const T* from, int64_t stride, std::vector<float>& to) const {
        for (int64_t d = 0; d < depth; ++d)
            for (int64_t c = 0; c < width; ++c) to[d * width + c] = read(from[d * stride + c]);
    }

    template <typename T>
    void put(const std::vector<float>& from, T* to, int64_t stride) const {
        for (int64_t d = 0; d < depth; ++d)
            for (int64_t c = 0; c < width; ++c) write(from[d * width + c], to + d * stride + c);
    }

    // Fetches q, k, v, which lie `heads` widths apart, and computes the probabilities.
    template <typename T>
    void prepare(const T* packed, int64_t stride, int64_t heads) {
        fetch(packed, stride, q);
        fetch(packed + heads * width, stride, k);
        fetch(packed + 2 * heads * width, stride, v);
        const float scale = 1.f / std::sqrt(float(width));
        for (int64_t i = 0; i < depth; ++i) {
            float* row = &p[i * depth];
            float top = -std::numeric_limits<float>::infinity(), sum = 0;
            for (int64_t j = 0; j <= i; ++j) {
                row[j] = scale * dot(&q[i * width], &k[j * width], width);
                top = row[j] > top ? row[j] : top;
            }
            for (int64_t j = 0; j <= i; ++j) sum += row[j] = exp_negative(row[j] - top);
            for (int64_t j = 0; j <= i; ++j) row[j] /= sum;
        }
    }
};

template <typename T>
void attend(const T* packed, T* out, int64_t depth, int64_t positions, int64_t heads,
            int64_t width, int threads) {
    const int64_t row = heads * width, stride = positions * row;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        Head head(depth, width);
        std::vector<float> sums(depth * width);
#pragma omp for
        for (int64_t m = 0; m < positions; ++m)
            for (int64_t h = 0; h < heads; ++h) {
                head.prepare(packed + 3 * m * row + h * width, 3 * stride, heads);
                sums.assign(sums.size(), 0.f);
                for (int64_t i = 0; i < depth; ++i)
                    for (int64_t j = 0; j <= i; ++j)
                        add(&sums[i * width], head.p[i * depth + j], &head.v[j * width], width);
                head.put(sums, out + m * row + h * width, stride);
            }
    }
}

template <typename T>
void attend_backward(const T* packed, const T* grad, T* grad_packed, int64_t depth,
                     int64_t positions, int64_t heads, int64_t width, int threads) {
    const int64_t row = heads * width, stride = positions * row;
    const float scale = 1.f / std::sqrt(float(width));
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        Head head(depth, width);
        std::vector<float> g(depth * width), dq(g), dk(g), dv(g), ds(depth);
#pragma omp for
        for (int64_t m = 0; m < positions; ++m)
            for (int64_t h = 0; h < heads; ++h) {
                head.prepare(packed + 3 * m * row + h * width, 3 * stride, heads);
                head.fetch(grad + m * row + h * width, stride, g);
                for (auto* x : {&dq, &dk, &dv}) x->assign(x->size(), 0.f);
                for (int64_t i = 0; i < depth; ++i) {
                    const float *p = &head.p[i * depth], *gi = &g[i * width];
                    float mean = 0;
                    for (int64_t j = 0; j <= i; ++j) {
                        ds[j] = dot(gi, &head.v[j * width], width);
                        mean += p[j] * ds[j];
                    }
                    for (int64_t j = 0; j <= i; ++j) {
                        const float s = scale * p[j] * (ds[j] - mean);
                        add(&dv[j * width], p[j], gi, width);
                        add(&dq[i * width], s, &head.k[j * width], width);
                        add(&dk[j * width], s, &head.q[i * width], width);
                    }
                }
                T* to = grad_packed + 3 * m * row + h * width;
                head.put(dq, to, 3 * stride);
                head.put(dk, to + row, 3 * stride);
                head.put(dv, to + 2 * row, 3 * stride);
            }
    }
}

float highest(const float* x, int64_t size) {
    float top = -std::numeric_limits<float>::infinity();
#pragma omp simd reduction(max : top)
    for (int64_t k = 0; k < size; ++k) top = x[k] > top ? x[k] : top;
    return top;
}

// x becomes exp(x - top); its sum comes back, added up in blocks so that long rows lose no digit.
float exponentiate(float* x, int64_t size, float top) {
    const int64_t block = 1024;
    double total = 0;
    for (int64_t start = 0; start < size; start += block) {
        const int64_t end = start + block < size ? start + block : size;
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t k = start; k < end; ++k) sum += x[k] = exp_negative(x[k] - top);
        total += sum;
    }
    return float(total);
}

enum Steps { FIND = 1, EXPONENTIATE = 2, SCALE = 4 };

// Rows of logits to the gradient of their cross-entropy. A row takes all steps while it is in the
// cache, or one at a time, where `top` and `total` are those of other ranks too.
template <typename T>
void softmax(T* gradient, float* logits, const int64_t* columns, float* top, float* total,
             float* target, int64_t rows, int64_t size, int64_t steps, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t m = 0; m < rows; ++m) {
        float* x = logits + m * size;
        const int64_t column = columns[m];
        const bool is_own = column >= 0 && column < size;
        if (steps & FIND) {
            top[m] = highest(x, size);
            target[m] = is_own ? x[column] : 0.f;
        }
        if (steps & EXPONENTIATE) total[m] = exponentiate(x, size, top[m]);
        if (steps & SCALE) {
            const float factor = 1.f / total[m];
            for (int64_t k = 0; k < size; ++k) x[k] *= factor;
            if (is_own) x[column] -= 1.f;
            if (static_cast<void*>(gradient) != logits)
                for (int64_t k = 0; k < size; ++k) write(x[k], gradient + m * size + k);
        }
    }
}

// Root-mean-square norm of a row, kept in fp32 in `fetched`; gives 1 / root.
template <typename T>
float fetch_row(const T* x, float* fetched, int64_t size, float eps) {
    for (int64_t k = 0; k < size; ++k) fetched[k] = read(x[k]);
    return 1.f / std::sqrt(dot(fetched, fetched, size) / float(size) + eps);
}

template <typename T>
void norm(const T* x, const T* weight, T* y, int64_t rows, int64_t size, float eps, int threads) {
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        std::vector<float> row(size);
#pragma omp for
        for (int64_t m = 0; m < rows; ++m) {
            const float inverse = fetch_row(x + m * size, row.data(), size, eps);
            for (int64_t k = 0; k < size; ++k)
                write(row[k] * inverse * read(weight[k]), y + m * size + k);
        }
    }
}

// The weight's gradient is a sum over blocks of rows, each of which has a sum of its own.
template <typename T>
void norm_backward(const T* x, const T* grad, const T* weight, T* grad_x, float* grad_weight,
                   int64_t rows, int64_t size, float eps, int threads) {
    const int64_t block = 64, blocks = (rows + block - 1) / block;
    std::vector<float> sums(blocks * size);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        std::vector<float> row(size), given(size);
#pragma omp for
        for (int64_t b = 0; b < blocks; ++b) {
            float* sum = &sums[b * size];
            const int64_t end = (b + 1) * block < rows ? (b + 1) * block : rows;
            for (int64_t m = b * block; m < end; ++m) {
                const float inverse = fetch_row(x + m * size, row.data(), size, eps);
                for (int64_t k = 0; k < size; ++k) {
                    const float g = read(grad[m * size + k]);
                    sum[k] += g * row[k] * inverse;
                    given[k] = g * read(weight[k]);
                }
                const float along =
                    dot(given.data(), row.data(), size) * inverse * inverse / float(size);
                for (int64_t k = 0; k < size; ++k)
                    write((given[k] - along * row[k]) * inverse, grad_x + m * size + k);
            }
        }
    }
    for (int64_t k = 0; k < size; ++k) {
        double total = 0;
        for (int64_t b = 0; b < blocks; ++b) total += sums[b * size + k];
        grad_weight[k] = float(total);
    }
}

}  // namespace

extern "C" {

void attend_fp32(const float* packed, float* out, int64_t depth, int64_t positions, int64_t heads,
                 int64_t width, int threads) {
    attend(packed, out, depth, positions, heads, width, threads);
}

void attend_bf16(const Bf16* packed, Bf16* out, int64_t depth, int64_t positions, int64_t heads,
                 int64_t width, int threads) {
    attend(packed, out, depth, positions, heads, width, threads);
}

void attend_backward_fp32(const float* packed, const float* grad, float* grad_packed,
                          int64_t depth, int64_t positions, int64_t heads, int64_t width,
                          int threads) {
    attend_backward(packed, grad, grad_packed, depth, positions, heads, width, threads);
}

void attend_backward_bf16(const Bf16* packed, const Bf16* grad, Bf16* grad_packed, int64_t depth,
                          int64_t positions, int64_t heads, int64_t width, int threads) {
    attend_backward(packed, grad, grad_packed, depth, positions, heads, width, threads);
}

void softmax_fp32(float* gradient, float* logits, const int64_t* columns, float* top, float* total,
                  float* target, int64_t rows, int64_t size, int64_t steps, int threads) {
    softmax(gradient, logits, columns, top, total, target, rows, size, steps, threads);
}

void softmax_bf16(Bf16* gradient, float* logits, const int64_t* columns, float* top, float* total,
                  float* target, int64_t rows, int64_t size, int64_t steps, int threads) {
    softmax(gradient, logits, columns, top, total, target, rows, size, steps, threads);
}

void norm_fp32(const float* x, const float* weight, float* y, int64_t rows, int64_t size,
               float eps, int threads) {
    norm(x, weight, y, rows, size, eps, threads);
}

void norm_bf16(const Bf16* x, const Bf16* weight, Bf16* y, int64_t rows, int64_t size, float eps,
               int threads) {
    norm(x, weight, y, rows, size, eps, threads);
}

void norm_backward_fp32(const float* x, const float* grad, const float* weight, float* grad_x,
                        float* grad_weight, int64_t rows, int64_t size, float eps, int threads) {
    norm_backward(x, grad, weight, grad_x, grad_weight, rows, size, eps, threads);
}

void norm_backward_bf16(const Bf16* x, const Bf16* grad, const Bf16* weight, Bf16* grad_x,
                        float* grad_weight, int64_t rows, int64_t size, float eps, int threads) {
    norm_backward(x, grad, weight, grad_x, grad_weight, rows, size, eps, threads);
}

}  // extern "C"
