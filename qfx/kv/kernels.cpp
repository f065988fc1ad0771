// Attention over the codes of a cache, in one pass over its memory, and what takes new tokens.
//
// qfx/kv/native.py builds and calls it; qfx/kv/attend.py and qfx/kv/codes.py are what it must equal, and tell the
// layout of the memory. Tokens are decoded into a tile of floats that stays in the first cache, whatever their format.
// No option of the compiler may change how floats are rounded elsewhere in the process (no -ffast-math).

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace {

constexpr int64_t kTile = 4096;  // floats of a tile, where a unit of tokens is no larger
enum Kind { kSigned, kUnsigned, kTable };
enum ScaleType { kF32, kF16, kBF16, kE8M0 };

float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

}  // namespace

extern "C" {

// Keys or values of some heads; see `Codes` in qfx/kv/codes.py.
struct Codes {
  const uint8_t* data;
  const uint8_t* scale;
  const uint8_t* zero;  // null: nothing is taken off, but the middle of signed codes below 8 bits
  const float* table;   // what codes of floating types stand for
  int64_t data_batch, data_head;    // bytes from one sequence and from one head to the next
  int64_t scale_batch, scale_head;  // elements of scale and zero
  int64_t width, scales;            // channels; scales of a group (0: none)
  int64_t group, channels;          // tokens, and channels, that share a scale
  int32_t bits, kind, scale_type, zero_bytes;
};

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

float half(uint16_t h) {
  const uint32_t sign = (h & 0x8000u) << 16;
  return bits_to_float(sign | float_to_bits(bits_to_float((h & 0x7fffu) << 13) * 0x1p112f));
}

uint16_t to_half(float value) {  // of 2^-24 to 65504, to the nearest, ties to even
  const uint32_t bits = float_to_bits(value);
  if (value < 0x1p-14f) return static_cast<uint16_t>((value * 0x1p24f + 12582912.0f) - 12582912.0f);
  return static_cast<uint16_t>((bits - (112u << 23) + 0xfffu + ((bits >> 13) & 1)) >> 13);
}

float scale_at(const Codes& c, int64_t i) {
  if (c.scale_type == kF32) return reinterpret_cast<const float*>(c.scale)[i];
  if (c.scale_type == kE8M0) return bits_to_float(c.scale[i] ? static_cast<uint32_t>(c.scale[i]) << 23 : 0x400000u);
  const uint16_t raw = reinterpret_cast<const uint16_t*>(c.scale)[i];
  return c.scale_type == kF16 ? half(raw) : bits_to_float(static_cast<uint32_t>(raw) << 16);
}

float zero_at(const Codes& c, int64_t i) {
  if (!c.zero) return c.kind == kSigned && c.bits < 8 ? static_cast<float>(1 << (c.bits - 1)) : 0.0f;
  return c.zero_bytes == 1 ? reinterpret_cast<const int8_t*>(c.zero)[i] : reinterpret_cast<const int16_t*>(c.zero)[i];
}

int64_t planes_of(const Codes& c) { return c.bits == 8 ? 1 : c.bits == 4 ? 2 : c.bits == 2 ? 4 : 8; }

int64_t unit_of(const Codes& c) {  // both are powers of two, or one divides the other's multiple that we take
  int64_t unit = c.group;
  while (unit % planes_of(c)) unit += c.group;
  return unit;
}

bool one_scale(const Codes& c) { return c.scales == 1 && c.group == 1; }

template <int kBits>
void unpack(const uint8_t* data, int64_t units, int64_t width, const float* table, float* out) {
  constexpr int kPlanes = kBits == 4 ? 2 : kBits == 2 ? 4 : 8, kRows = kPlanes * kBits / 8;
  for (int64_t u = 0; u < units; ++u, data += kRows * width) {
#pragma GCC unroll 8
    for (int i = 0; i < kPlanes; ++i, out += width) {
      const int shift = i * kBits % 8;
      const uint8_t* low = data + i * kBits / 8 * width;
      const uint8_t* high = shift + kBits > 8 ? low + width : low;
      const int left = shift + kBits > 8 ? 8 - shift : 0;
      if (table) {
        for (int64_t ch = 0; ch < width; ++ch)
          out[ch] = table[((low[ch] >> shift) | (left ? high[ch] << left : 0)) & ((1 << kBits) - 1)];
      } else {
#pragma omp simd
        for (int64_t ch = 0; ch < width; ++ch)
          out[ch] = static_cast<float>(((low[ch] >> shift) | (left ? high[ch] << left : 0)) & ((1 << kBits) - 1));
      }
    }
  }
}

void decode(const Codes& c, const uint8_t* head, int64_t at, int64_t n, float* out) {
  const int64_t units = n / planes_of(c), count = n * c.width;
  const float* table = c.kind == kTable ? c.table : nullptr;
  const uint8_t* data = head + at * c.width * c.bits / 8;
  switch (c.bits) {
    case 2: return unpack<2>(data, units, c.width, table, out);
    case 3: return unpack<3>(data, units, c.width, table, out);
    case 4: return unpack<4>(data, units, c.width, table, out);
    case 5: return unpack<5>(data, units, c.width, table, out);
    case 6: return unpack<6>(data, units, c.width, table, out);
    case 7: return unpack<7>(data, units, c.width, table, out);
    default: break;
  }
  if (c.kind == kSigned) {
    const int8_t* codes = reinterpret_cast<const int8_t*>(data);
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) out[i] = static_cast<float>(codes[i]);
  } else if (c.kind == kUnsigned) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) out[i] = static_cast<float>(data[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) out[i] = table[data[i]];
  }
}

// Scales and zero points from the i-th on.
void steps_of(const Codes& c, int64_t i, int64_t n, float* steps, float* zeros) {
  if (c.scale_type == kF16) {
    const uint16_t* raw = reinterpret_cast<const uint16_t*>(c.scale) + i;
#pragma omp simd
    for (int64_t t = 0; t < n; ++t) steps[t] = half(raw[t]);
  } else {
    for (int64_t t = 0; t < n; ++t) steps[t] = scale_at(c, i + t);
  }
  for (int64_t t = 0; t < n; ++t) zeros[t] = zero_at(c, i + t);
}

// Decoded tokens at .. at + n - 1, whole units, times their scales.
void rescale(const Codes& c, int64_t base, int64_t at, int64_t n, float* out, float* steps, float* offs) {
  const int64_t width = c.width;
  for (int64_t g = 0; g < n / c.group; ++g) {
    const int64_t row = base + (at / c.group + g) * c.scales;
    if (c.scales == width) steps_of(c, row, width, steps, offs);
    for (int64_t ch = 0, i = 0; i < c.scales && c.scales < width; ++i) {
      const float step = scale_at(c, row + i), zero = zero_at(c, row + i);
      for (int64_t last = ch + c.channels < width ? ch + c.channels : width; ch < last; ++ch) {
        steps[ch] = step;
        offs[ch] = zero;
      }
    }
    for (int64_t ch = 0; ch < width; ++ch) offs[ch] *= steps[ch];
    for (int64_t t = 0; t < c.group; ++t, out += width) {
#pragma omp simd
      for (int64_t ch = 0; ch < width; ++ch) out[ch] = out[ch] * steps[ch] - offs[ch];
    }
  }
}

// out[r][t] = q[r] . x[t]; kWidth 0: any width.
template <int kWidth>
void dots(const float* q, int64_t rows, const float* x, int64_t stride, int64_t n, int64_t w, float* out,
          int64_t length) {
  const int64_t width = kWidth ? kWidth : w;
  for (int64_t r = 0; r < rows; ++r, q += width, out += length) {
    int64_t t = 0;
    for (; t + 4 <= n; t += 4) {
      const float *a = x + t * stride, *b = a + stride, *c = b + stride, *d = c + stride;
      float s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
      for (int64_t ch = 0; ch < width; ++ch) {
        s0 += q[ch] * a[ch];
        s1 += q[ch] * b[ch];
        s2 += q[ch] * c[ch];
        s3 += q[ch] * d[ch];
      }
      out[t] = s0;
      out[t + 1] = s1;
      out[t + 2] = s2;
      out[t + 3] = s3;
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
  if (w == 32) return dots<32>(q, rows, x, stride, n, w, out, length);
  if (w == 64) return dots<64>(q, rows, x, stride, n, w, out, length);
  if (w == 128) return dots<128>(q, rows, x, stride, n, w, out, length);
  dots<0>(q, rows, x, stride, n, w, out, length);
}

void sums_of(const float* p, int64_t length, int64_t rows, const float* x, int64_t stride, int64_t n, int64_t w,
             float* out) {
  if (w == 32) return sums<32>(p, length, rows, x, stride, n, w, out);
  if (w == 64) return sums<64>(p, length, rows, x, stride, n, w, out);
  if (w == 128) return sums<128>(p, length, rows, x, stride, n, w, out);
  sums<0>(p, length, rows, x, stride, n, w, out);
}

// Dots with codes to dots with values: out[r][t] = (out[r][t] - zeros[t] * sum(q[r])) * steps[t].
void scale_dots(const float* q, int64_t rows, int64_t width, int64_t n, const float* steps, const float* zeros, float* out,
                int64_t length) {
  for (int64_t r = 0; r < rows; ++r, q += width, out += length) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t ch = 0; ch < width; ++ch) sum += q[ch];
#pragma omp simd
    for (int64_t t = 0; t < n; ++t) out[t] = (out[t] - zeros[t] * sum) * steps[t];
  }
}

// Weights of values to weights of codes, in place; what their zero points come to is taken off out [rows][width].
void scale_weights(float* p, int64_t length, int64_t rows, int64_t n, const float* steps, const float* zeros, float* out,
                   int64_t width) {
  for (int64_t r = 0; r < rows; ++r, p += length, out += width) {
    float off = 0;
#pragma omp simd reduction(+ : off)
    for (int64_t t = 0; t < n; ++t) {
      p[t] *= steps[t];
      off += p[t] * zeros[t];
    }
    for (int64_t ch = 0; ch < width; ++ch) out[ch] -= off;
  }
}

int64_t tokens_of(const Codes& c) {  // of a tile
  const int64_t unit = unit_of(c), tokens = kTile / c.width / unit * unit;
  return tokens ? tokens : unit;
}

// Floats that a tile needs: its tokens, and two for each channel or token.
int64_t tile_room(const Codes& c) { return tokens_of(c) * c.width + 2 * (tokens_of(c) + c.width); }

// Calls what(tokens [n][width] of these, first, n, steps, zeros) for the stored tokens low .. high - 1. Where a token has
// one scale, the tokens are codes: to be taken off zeros[t], and times steps[t].
template <typename What>
void each_tile(const Codes& c, int64_t b, int64_t h, int64_t low, int64_t high, float* room, What what) {
  const int64_t unit = unit_of(c), most = tokens_of(c), base = b * c.scale_batch + h * c.scale_head;
  float *steps = room, *zeros = room + most + c.width, *x = zeros + most + c.width;
  for (int64_t at = low / unit * unit; at < high; at += most) {
    const int64_t left = (high - at + unit - 1) / unit * unit, n = most < left ? most : left;
    decode(c, c.data + b * c.data_batch + h * c.data_head, at, n, x);
    if (one_scale(c)) {
      steps_of(c, base + at, n, steps, zeros);
    } else {
      rescale(c, base, at, n, x, steps, zeros);
    }
    const int64_t first = at < low ? low : at, last = at + n < high ? at + n : high, cut = first - at;
    what(x + cut * c.width, first, last - first, steps + cut, zeros + cut);
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
  const int64_t keys = tile_room(l->stored[0]), values = tile_room(l->stored[1]), each = keys > values ? keys : values;
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
      each_tile(keys, p.b, p.h, p.low, p.high, mine, [&](auto x, int64_t at, int64_t n, auto steps, auto zeros) {
        float* here = s + a + at - l.start;
        dots_of(mq, rows, x, keys.width, n, keys.width, here, length);
        if (one_scale(keys)) scale_dots(mq, rows, keys.width, n, steps, zeros, here, length);
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
      float* s = scores + (p.b * l.parts_heads + p.h) * rows * length;
      float* y = found + item * rows * values.width;
      std::memset(y, 0, sizeof(float) * rows * values.width);
      const Floats &first = l.first[1], &rest = l.rest[1];
      if (p.begins) sums_of(s, length, rows, of_head(first, p), first.token, first.count, values.width, y);
      if (p.ends) sums_of(s + b, length, rows, of_head(rest, p), rest.token, rest.count, values.width, y);
      each_tile(values, p.b, p.h, p.low, p.high, mine, [&](auto x, int64_t at, int64_t n, auto steps, auto zeros) {
        float* here = s + a + at - l.start;
        if (one_scale(values)) scale_weights(here, length, rows, n, steps, zeros, y, values.width);
        sums_of(here, length, rows, x, values.width, n, values.width, y);
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
