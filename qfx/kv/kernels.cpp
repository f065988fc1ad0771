// Attention over the codes of a cache, in one pass over its memory, and what takes new tokens.
//
// qfx/kv/native.py builds and calls it; qfx/kv/attend.py is what it must equal. Tokens are decoded into a tile of floats
// that stays in the first cache; scales and zero points are folded into queries and scores, or into weights. No option
// of the compiler may change how floats are rounded elsewhere in the process (no -ffast-math).

#include <cmath>
#include <limits>

#include "codes.h"

#ifdef _OPENMP
#include <omp.h>
#endif

extern "C" {

// Tokens in f32, [B, G, count, width] with consecutive channels.
struct Floats {
  const float* data;
  int64_t batch, head, token;  // elements from one to the next
  int64_t count;
};

// Added to scores [B, G, n, S, L] with these strides (0: the same for all), f32 or bool (what is false is left out).
struct Mask {
  const void* data;
  int64_t stride[5];
  int32_t is_float;
};

struct Layer {
  Codes stored[2];  // keys, values
  Floats first[2], rest[2];
  const int64_t* heads;  // numbers of the heads of `stored`
  int64_t parts_heads;   // how many
  int64_t start, end;    // stored tokens that are read
  int64_t batch, groups, many, queries;  // B, G, n, S
};

}  // extern "C"

namespace {

using Lanes = float __attribute__((vector_size(64), aligned(4), may_alias));

#define QFX_HALVES(a, b, d)                                                                                    \
  (__builtin_shufflevector(a, b, d(0, 0), d(0, 1), d(0, 2), d(0, 3), d(0, 4), d(0, 5), d(0, 6), d(0, 7),        \
                           d(0, 8), d(0, 9), d(0, 10), d(0, 11), d(0, 12), d(0, 13), d(0, 14), d(0, 15)) +      \
   __builtin_shufflevector(a, b, d(1, 0), d(1, 1), d(1, 2), d(1, 3), d(1, 4), d(1, 5), d(1, 6), d(1, 7),        \
                           d(1, 8), d(1, 9), d(1, 10), d(1, 11), d(1, 12), d(1, 13), d(1, 14), d(1, 15)))
// The i-th of 16 lanes out of the lower (0) or upper (1) halves of runs of 2 * size lanes of two vectors.
#define QFX_RUN8(upper, i) ((i) / 8 * 16 + (i) % 8 + 8 * (upper))
#define QFX_RUN4(upper, i) ((i) / 4 * 8 + (i) % 4 + 4 * (upper))
#define QFX_RUN2(upper, i) ((i) / 2 * 4 + (i) % 2 + 2 * (upper))
#define QFX_RUN1(upper, i) ((i) * 2 + (upper))

// Sums of the lanes of 16 vectors, of which it overwrites the first ones.
Lanes sums_of_lanes(Lanes* v) {
  for (int i = 0; i < 8; ++i) v[i] = QFX_HALVES(v[2 * i], v[2 * i + 1], QFX_RUN8);
  for (int i = 0; i < 4; ++i) v[i] = QFX_HALVES(v[2 * i], v[2 * i + 1], QFX_RUN4);
  for (int i = 0; i < 2; ++i) v[i] = QFX_HALVES(v[2 * i], v[2 * i + 1], QFX_RUN2);
  return QFX_HALVES(v[0], v[1], QFX_RUN1);
}

// out[r][t] = q[r] . x[t]; kWidth 0: any width.
template <int kWidth>
void dots(const float* q, int64_t rows, const float* x, int64_t stride, int64_t n, int64_t w, float* out,
          int64_t length) {
  const int64_t width = kWidth ? kWidth : w;
  for (int64_t r = 0; r < rows; ++r, q += width, out += length) {
    int64_t t = 0;
    for (; kWidth && t + 16 <= n; t += 16) {
      Lanes found[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        const float* row = x + (t + i) * stride;
        Lanes sum = *reinterpret_cast<const Lanes*>(q) * *reinterpret_cast<const Lanes*>(row);
#pragma GCC unroll 8
        for (int ch = 16; ch < kWidth; ch += 16)
          sum += *reinterpret_cast<const Lanes*>(q + ch) * *reinterpret_cast<const Lanes*>(row + ch);
        found[i] = sum;
      }
      *reinterpret_cast<Lanes*>(out + t) = sums_of_lanes(found);
    }
    for (; t < n; ++t) {
      float s = 0;
#pragma omp simd reduction(+ : s)
      for (int64_t ch = 0; ch < width; ++ch) s += q[ch] * x[t * stride + ch];
      out[t] = s;
    }
  }
}

// out[r] += p[r][t] * x[t]
template <int kWidth>
void sums(const float* p, int64_t length, int64_t rows, const float* x, int64_t stride, int64_t n, int64_t w,
          float* out) {
  const int64_t width = kWidth ? kWidth : w;
  for (int64_t r = 0; r < rows; ++r, p += length, out += width) {
    if constexpr (kWidth != 0) {
      float sum[kWidth];
      std::memcpy(sum, out, sizeof(sum));
      for (int64_t t = 0; t < n; ++t) {
        const float* row = x + t * stride;
        const float weight = p[t];
#pragma omp simd
        for (int64_t ch = 0; ch < kWidth; ++ch) sum[ch] += weight * row[ch];
      }
      std::memcpy(out, sum, sizeof(sum));
    } else {
      for (int64_t t = 0; t < n; ++t) {
        const float* row = x + t * stride;
        const float weight = p[t];
#pragma omp simd
        for (int64_t ch = 0; ch < width; ++ch) out[ch] += weight * row[ch];
      }
    }
  }
}

void dots_of(const float* q, int64_t rows, const float* x, int64_t stride, int64_t n, int64_t w, float* out,
             int64_t length) {
  if (w == 16) return dots<16>(q, rows, x, stride, n, w, out, length);
  if (w == 32) return dots<32>(q, rows, x, stride, n, w, out, length);
  if (w == 64) return dots<64>(q, rows, x, stride, n, w, out, length);
  if (w == 128) return dots<128>(q, rows, x, stride, n, w, out, length);
  dots<0>(q, rows, x, stride, n, w, out, length);
}

void sums_of(const float* p, int64_t length, int64_t rows, const float* x, int64_t stride, int64_t n, int64_t w,
             float* out) {
  if (w == 16) return sums<16>(p, length, rows, x, stride, n, w, out);
  if (w == 32) return sums<32>(p, length, rows, x, stride, n, w, out);
  if (w == 64) return sums<64>(p, length, rows, x, stride, n, w, out);
  if (w == 128) return sums<128>(p, length, rows, x, stride, n, w, out);
  sums<0>(p, length, rows, x, stride, n, w, out);
}

// Scores of the tokens first .. first + n - 1, of which x holds the codes, with q [rows][width]: out[r][t].
void score(const Codes& c, int64_t base, const float* x, int64_t first, int64_t n, const float* q, int64_t rows,
           const Room& room, float* out, int64_t length) {
  const int64_t width = c.width;
  if (one_scale(c)) {
    steps_of(c, base + first, n, room.steps, room.zeros);
    dots_of(q, rows, x, width, n, width, out, length);
    for (int64_t r = 0; r < rows; ++r, q += width, out += length) {
      float sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t ch = 0; ch < width; ++ch) sum += q[ch];
#pragma omp simd
      for (int64_t t = 0; t < n; ++t) out[t] = (out[t] - room.zeros[t] * sum) * room.steps[t];
    }
    return;
  }
  for (int64_t at = first, end = first + n; at < end;) {  // each group's scales go into the queries
    const int64_t g = at / c.group, last = (g + 1) * c.group < end ? (g + 1) * c.group : end;
    steps_of(c, base + g * c.scales, width, room.steps, room.zeros);
    for (int64_t r = 0; r < rows; ++r) {
      const float* own = q + r * width;
      float *scaled = room.queries + r * width, off = 0;
#pragma omp simd reduction(+ : off)
      for (int64_t ch = 0; ch < width; ++ch) {
        scaled[ch] = own[ch] * room.steps[ch];
        off += scaled[ch] * room.zeros[ch];
      }
      float* here = out + r * length + at - first;
      dots_of(scaled, 1, x + (at - first) * width, width, last - at, width, here, length);
      for (int64_t t = 0; t < last - at; ++t) here[t] -= off;
    }
    at = last;
  }
}

// Adds to out [rows][width] the tokens first .. first + n - 1, of which x holds the codes, weighted by p[r][t].
void weigh(const Codes& c, int64_t base, const float* x, int64_t first, int64_t n, const float* p, int64_t length,
           int64_t rows, const Room& room, float* out) {
  steps_of(c, base + first * c.scales, n * c.scales, room.steps, room.zeros);
  for (int64_t i = 0; i < c.scales; ++i) {
    const int64_t ch = i * c.channels, many = ch + c.channels < c.width ? c.channels : c.width - ch;
    for (int64_t r = 0; r < rows; ++r) {
      const float* own = p + r * length;
      float off = 0;
#pragma omp simd reduction(+ : off)
      for (int64_t t = 0; t < n; ++t) {
        room.weights[t] = own[t] * room.steps[t * c.scales + i];
        off += room.weights[t] * room.zeros[t * c.scales + i];
      }
      float* y = out + r * c.width + ch;
      sums_of(room.weights, n, 1, x + ch, c.width, n, many, y);
      for (int64_t k = 0; k < many; ++k) y[k] -= off;
    }
  }
}

float exponential(float x) {  // of x <= 0, relative error about 1e-7 (the polynomial is that of Cephes)
  const float clamped = x < -87.0f ? -87.0f : x;
  const float n = (clamped * 1.44269504f + 12582912.0f) - 12582912.0f;
  const float r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const float power = bits_to_float(static_cast<uint32_t>(static_cast<int32_t>(n) + 127) << 23);
  return x < -87.0f ? 0.0f : p * power;
}

// Scores of a row to weights that add up to 1; all 0 where no token is seen, NaN where a score is.
void softmax(float* s, int64_t n) {
  const float least = -std::numeric_limits<float>::infinity();
  float most = least, sum = 0;
  int bad = 0;
#pragma omp simd reduction(max : most) reduction(| : bad)
  for (int64_t t = 0; t < n; ++t) {
    most = s[t] > most ? s[t] : most;
    bad |= s[t] != s[t];
  }
  if (bad || most == least || most == -least) {
    const float all = bad || most != least ? std::numeric_limits<float>::quiet_NaN() : 0.0f;
    for (int64_t t = 0; t < n; ++t) s[t] = all;
    return;
  }
#pragma omp simd reduction(+ : sum)
  for (int64_t t = 0; t < n; ++t) {
    s[t] = exponential(s[t] - most);
    sum += s[t];
  }
  const float part = 1.0f / sum;
#pragma omp simd
  for (int64_t t = 0; t < n; ++t) s[t] *= part;
}

void add_mask(const Mask& m, int64_t b, int64_t g, int64_t n, int64_t q, float* s, int64_t length) {
  const int64_t at = b * m.stride[0] + g * m.stride[1] + n * m.stride[2] + q * m.stride[3], step = m.stride[4];
  if (m.is_float) {
    const float* bias = static_cast<const float*>(m.data) + at;
    for (int64_t t = 0; t < length; ++t) s[t] += bias[t * step];
  } else {
    const uint8_t* seen = static_cast<const uint8_t*>(m.data) + at;
    for (int64_t t = 0; t < length; ++t) s[t] = seen[t * step] ? s[t] : -std::numeric_limits<float>::infinity();
  }
}

// One piece of one head's work: scores of, or sums over, the stored tokens low .. high - 1.
struct Piece {
  int64_t b, h, g, low, high;
  bool begins, ends;
};

Piece piece_of(const Layer& l, int64_t item, int64_t pieces) {
  const int64_t head = item / pieces, piece = item % pieces, count = l.end - l.start;
  const int64_t h = head % l.parts_heads;
  return {head / l.parts_heads, h, l.heads ? l.heads[h] : h, l.start + count * piece / pieces,
          l.start + count * (piece + 1) / pieces, piece == 0, piece == pieces - 1};
}

const float* of_head(const Floats& f, const Piece& p) { return f.data + p.b * f.batch + p.g * f.head; }

}  // namespace

extern "C" {

// Floats that `qfx_attend` needs for its own use.
int64_t qfx_room(const Layer* l, int64_t pieces, int64_t threads) {
  const int64_t rows = l->many * l->queries, length = l->first[0].count + l->end - l->start + l->rest[0].count;
  const int64_t keys = Room::size(l->stored[0], rows), values = Room::size(l->stored[1], rows);
  const int64_t each = keys > values ? keys : values;
  const int64_t heads = l->batch * l->parts_heads;
  return heads * rows * length + threads * each + heads * pieces * rows * l->stored[1].width;
}

// out [B, G, n * S, Dv] of q [B, G, n * S, D], already scaled; only the heads of `stored` are written.
void qfx_attend(const Layer* layer, const float* q, const Mask* mask, float* room, float* out, int64_t pieces,
                int64_t threads) {
  const Layer& l = *layer;
  const Codes &keys = l.stored[0], &values = l.stored[1];
  const int64_t rows = l.many * l.queries, heads = l.batch * l.parts_heads, items = heads * pieces;
  const int64_t a = l.first[0].count, b = a + l.end - l.start, length = b + l.rest[0].count;
  float* scores = room;
  float* found = scores + heads * rows * length;
  float* own = found + items * rows * values.width;
  const int64_t each = (qfx_room(layer, pieces, 1) - (own - room));
#pragma omp parallel num_threads(static_cast<int>(threads)) if (threads > 1)
  {
    float* mine = own;
#ifdef _OPENMP
    mine += omp_get_thread_num() * each;
#endif
#pragma omp for
    for (int64_t item = 0; item < items; ++item) {
      const Piece p = piece_of(l, item, pieces);
      float* s = scores + (p.b * l.parts_heads + p.h) * rows * length;
      const float* mq = q + (p.b * l.groups + p.g) * rows * keys.width;
      const Floats &first = l.first[0], &rest = l.rest[0];
      if (p.begins) dots_of(mq, rows, of_head(first, p), first.token, first.count, keys.width, s, length);
      if (p.ends) dots_of(mq, rows, of_head(rest, p), rest.token, rest.count, keys.width, s + b, length);
      const Room own_room(keys, mine, rows);
      const int64_t base = p.b * keys.scale_batch + p.h * keys.scale_head;
      each_tile(keys, p.b, p.h, p.low, p.high, own_room, [&](const float* x, int64_t at, int64_t n) {
        score(keys, base, x, at, n, mq, rows, own_room, s + a + at - l.start, length);
      });
    }
#pragma omp for
    for (int64_t item = 0; item < heads * rows; ++item) {
      const Piece p = piece_of(l, item / rows, 1);
      float* s = scores + item * length;
      const int64_t r = item % rows;
      if (mask) add_mask(*mask, p.b, p.g, r / l.queries, r % l.queries, s, length);
      softmax(s, length);
    }
#pragma omp for
    for (int64_t item = 0; item < items; ++item) {
      const Piece p = piece_of(l, item, pieces);
      const float* s = scores + (p.b * l.parts_heads + p.h) * rows * length;
      float* y = found + item * rows * values.width;
      std::memset(y, 0, sizeof(float) * rows * values.width);
      const Floats &first = l.first[1], &rest = l.rest[1];
      if (p.begins) sums_of(s, length, rows, of_head(first, p), first.token, first.count, values.width, y);
      if (p.ends) sums_of(s + b, length, rows, of_head(rest, p), rest.token, rest.count, values.width, y);
      const Room own_room(values, mine, rows);
      const int64_t base = p.b * values.scale_batch + p.h * values.scale_head;
      each_tile(values, p.b, p.h, p.low, p.high, own_room, [&](const float* x, int64_t at, int64_t n) {
        weigh(values, base, x, at, n, s + a + at - l.start, length, rows, own_room, y);
      });
    }
#pragma omp for
    for (int64_t head = 0; head < heads; ++head) {
      const Piece p = piece_of(l, head, 1);
      const int64_t count = rows * values.width;
      float* y = out + (p.b * l.groups + p.g) * count;
      for (int64_t i = 0; i < count; ++i) {
        float sum = 0;
        for (int64_t piece = 0; piece < pieces; ++piece) sum += found[(head * pieces + piece) * count + i];
        y[i] = sum;
      }
    }
  }
}

// Copy x [B, G, n, D] to `to` [B, G, *, D]; returns whether all of it is finite.
int qfx_take(const Floats* x, const Floats* to, int64_t batch, int64_t heads, int64_t width) {
  int bad = 0;
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t t = 0; t < x->count; ++t) {
        const float* from = x->data + b * x->batch + h * x->head + t * x->token;
        float* out = const_cast<float*>(to->data) + b * to->batch + h * to->head + t * to->token;
#pragma omp simd reduction(| : bad)
        for (int64_t ch = 0; ch < width; ++ch) {
          out[ch] = from[ch];
          bad |= (float_to_bits(from[ch]) & 0x7f800000u) == 0x7f800000u;
        }
      }
  return !bad;
}

// Store x [B, G, n, D] as i8/tok/f16, tokens at .. at + n - 1.
void qfx_encode(const Floats* x, const Codes* to, int64_t batch, int64_t heads, int64_t at) {
  const int64_t width = to->width;
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t t = 0; t < x->count; ++t) {
        const float* from = x->data + b * x->batch + h * x->head + t * x->token;
        int8_t* codes = reinterpret_cast<int8_t*>(const_cast<uint8_t*>(to->data)) + b * to->data_batch +
                        h * to->data_head + (at + t) * width;
        uint16_t* scales = reinterpret_cast<uint16_t*>(const_cast<uint8_t*>(to->scale));
        float most = 0;
#pragma omp simd reduction(max : most)
        for (int64_t ch = 0; ch < width; ++ch) most = std::fabs(from[ch]) > most ? std::fabs(from[ch]) : most;
        most = most / 127.0f;
        most = most < 0x1p-24f ? 0x1p-24f : most > 65504.0f ? 65504.0f : most;
        const uint16_t raw = to_half(most);
        const float step = half(raw);
        scales[b * to->scale_batch + h * to->scale_head + at + t] = raw;
#pragma omp simd
        for (int64_t ch = 0; ch < width; ++ch) {
          float code = from[ch] / step;
          code = code > 127.0f ? 127.0f : code < -127.0f ? -127.0f : code;
          codes[ch] = static_cast<int8_t>((code + 12582912.0f) - 12582912.0f);
        }
      }
}

}  // extern "C"
