// Codes of a cache as floats, tile by tile; qfx/kv/codes.py is what this must equal, and tells the layout.

#pragma once

#include <cstdint>
#include <cstring>

namespace {

constexpr int64_t kTile = 4096;  // floats of a tile, where a unit of tokens is no larger
enum Kind { kSigned, kUnsigned, kTable, kE4M3 };
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

}  // extern "C"

namespace {

// A small float without sign, of which kFraction bits stand behind the exponent, as a float. No step of it is a
// subnormal float, which a process may have told the processor to take for 0 (torch.set_flush_denormal).
template <int kFraction, int kBias>
uint32_t widened(uint32_t code) {
  const uint32_t small = code < 1u << kFraction;  // 1 + fraction, less 1
  const float whole = bits_to_float((code << (23 - kFraction)) + ((127u - kBias + small) << 23));
  return float_to_bits(whole - bits_to_float((128u - kBias) << 23 & (0u - small)));
}

bool flushes() {  // whether this thread takes subnormal floats for 0
  volatile float least = 0x1p-149f;
  return least * 0x1p126f == 0.0f;
}

float half(uint16_t h) { return bits_to_float((h & 0x8000u) << 16 | widened<10, 15>(h & 0x7fffu)); }

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
  } else if (c.kind == kE4M3 && !flushes()) {  // a float's exponent is 120 more; no code is NaN
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t code = data[i];
      out[i] = bits_to_float((code & 0x80u) << 24 | (code & 0x7fu) << 20) * 0x1p120f;
    }
  } else if (c.kind == kE4M3) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t code = data[i];
      out[i] = bits_to_float((code & 0x80u) << 24 | widened<3, 7>(code & 0x7fu));
    }
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
  if (c.zero && c.zero_bytes == 1) {
    const int8_t* raw = reinterpret_cast<const int8_t*>(c.zero) + i;
#pragma omp simd
    for (int64_t t = 0; t < n; ++t) zeros[t] = raw[t];
  } else {
    for (int64_t t = 0; t < n; ++t) zeros[t] = zero_at(c, i + t);
  }
}

int64_t tokens_of(const Codes& c) {  // of a tile
  const int64_t unit = unit_of(c), tokens = kTile / c.width / unit * unit;
  return tokens ? tokens : unit;
}

// Room of a tile: its tokens, steps and zeros of all its groups, queries of a group, weights of a row.
struct Room {
  float *tokens, *steps, *zeros, *queries, *weights;

  static int64_t side(const Codes& c) { return c.width + tokens_of(c) * c.scales; }
  static int64_t size(const Codes& c, int64_t rows) {
    return tokens_of(c) * (c.width + 1) + 2 * side(c) + rows * c.width;
  }
  Room(const Codes& c, float* room, int64_t rows) : tokens(room) {
    steps = tokens + tokens_of(c) * c.width;
    zeros = steps + side(c);
    queries = zeros + side(c);
    weights = queries + rows * c.width;
  }
};

// Calls what(codes of the tokens [n][width], first, n) for the stored tokens low .. high - 1.
template <typename What>
void each_tile(const Codes& c, int64_t b, int64_t h, int64_t low, int64_t high, const Room& room, What what) {
  const int64_t unit = unit_of(c), most = tokens_of(c);
  for (int64_t at = low / unit * unit; at < high; at += most) {
    const int64_t left = (high - at + unit - 1) / unit * unit, n = most < left ? most : left;
    decode(c, c.data + b * c.data_batch + h * c.data_head, at, n, room.tokens);
    const int64_t first = at < low ? low : at, last = at + n < high ? at + n : high;
    what(room.tokens + (first - at) * c.width, first, last - first);
  }
}

}  // namespace
