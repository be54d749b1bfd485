/* Rows of logits on a CPU: see cpu.py, which compiles this once for each choice of its parts.

   FORM is one of the functions below; it gives phi and q a of a token, where the loss is
   sum_i phi(p_i, q_i) and a = dphi / dq, shifted so that equal models have exactly 0, which changes
   nothing else. The gradient in the logits over T is q (a - <q, a>). The forms are those of
   row_kernel.py.

   HAS_FORM, HAS_KNOWN, HAS_LABELS   a teacher's logits, or a few of its tokens; labels
   CENTRED                           whether <q, a> has to be found
   KEEPS                             whether a row's powers of 2 are kept for its second reading
   STUDENT, STUDENT_SCALED, STUDENT_CAPPED, and of TEACHER: the type of logits, and what they need
   TILE                              tokens that are summed in float32; their sums are in float64
   FAR                               log-ratio beyond which a power would overflow

   Loops are plain ones that a compiler turns into vector code. Probabilities are powers of 2, of
   logits times log2(e). */

#include <math.h>

#include "numbers.h"

#define LOG2_E 1.44269504f
#define LN_2 0.693147181f
#define LANES 32 /* as many as a few vectors hold */

typedef struct {
    void *first; /* [rows, stride]; the first columns are logits */
    int64_t stride;
    float scale, cap;
} Logits;

typedef struct {
    const int64_t *ids; /* [rows, places]; none is twice in a row with a mass */
    const float *mass;
    int64_t places;
} Known;

typedef struct { /* of a row: its highest logit, and log2 sum 2^((z - top) cool) */
    float top, rest;
} Normalizer;

typedef struct { /* of each token 2^((z - top) cool), where each tile of them has its own top */
    float *of_tokens, *tops;
} Powers;

/* ---- powers and logarithms ---- */

/* 2^x for x <= 127, and 0 below 2^-126; exactly 1 at 0. A polynomial fitted to 2^f for
   |f| <= 1/2, off by 2e-9; adding 3 * 2^22 rounds x to a whole number, in the lowest bits. */
INLINE float power_of_2(float x) {
    float whole = x + 12582912.0f;
    float f = x - (whole - 12582912.0f);
    float r = 0.00015353362f;
    r = times_plus(r, f, 0.0013398875f);
    r = times_plus(r, f, 0.009618437f);
    r = times_plus(r, f, 0.055503324f);
    r = times_plus(r, f, 0.24022648f);
    r = times_plus(r, f, 0.69314718f);
    r = times_plus(r, f, 1.0f);
    float power = as_float((int32_t)((uint32_t)as_bits(r) + ((uint32_t)as_bits(whole) << 23)));
    return x < -126.0f ? 0.0f : power;
}

INLINE float power_of_e(float x) { return power_of_2(x * LOG2_E); }

/* log x, of normal x where x > 0; exactly 0 at 1. A polynomial fitted to log(1 + f) between
   sqrt(1/2) and sqrt(2), off by 6e-9 of it. */
INLINE float natural_log(float x) {
    int32_t from_root = as_bits(x) - 0x3f3504f3;
    float f = as_float((from_root & 0x007fffff) + 0x3f3504f3) - 1.0f;
    float r = -0.076345044f;
    r = times_plus(r, f, 0.12761582f);
    r = times_plus(r, f, -0.13160183f);
    r = times_plus(r, f, 0.14201757f);
    r = times_plus(r, f, -0.16623357f);
    r = times_plus(r, f, 0.20001227f);
    r = times_plus(r, f, -0.25000820f);
    r = times_plus(r, f, 0.33333331f);
    r = times_plus(times_plus(r, f, -0.5f), f * f, f);
    return x > 0.0f ? times_plus((float)(from_root >> 23), LN_2, r) : -INFINITY;
}

/* ---- forms: (p, q, log q - log p, share) -> phi and q a ---- */

typedef struct {
    float value, pulled;
} Pair;

/* p log(p / q); a = 1 - p / q, and <q, a> = 0 */
INLINE Pair forward_kl(float p, float q, float log_ratio, float share) {
    return (Pair){-p * log_ratio, q - p};
}

/* q log(q / p); a = log(q / p) */
INLINE Pair reverse_kl(float p, float q, float log_ratio, float share) {
    return (Pair){q * log_ratio, q * log_ratio};
}

/* share p log(p / m) + (1 - share) q log(q / m); a = (1 - share) log(q / m) */
INLINE Pair jensen_shannon(float p, float q, float log_ratio, float share) {
    log_ratio = log_ratio > FAR ? FAR : log_ratio;
    float log_mixture = natural_log(1.0f + (1.0f - share) * (power_of_e(log_ratio) - 1.0f));
    float pulled = (1.0f - share) * q * (log_ratio - log_mixture); /* log m - log p */
    return (Pair){pulled - share * p * log_mixture, pulled};
}

/* p log(p / m); a = (1 - share) (m - p) / m */
INLINE Pair skew_forward_kl(float p, float q, float log_ratio, float share) {
    log_ratio = log_ratio > FAR ? FAR : log_ratio;
    float excess = (1.0f - share) * (power_of_e(log_ratio) - 1.0f); /* m / p - 1 */
    return (Pair){-p * natural_log(1.0f + excess), (1.0f - share) * q * excess / (1.0f + excess)};
}

/* q log(q / m); a = log(q / m) + share (m - q) / m */
INLINE Pair skew_reverse_kl(float p, float q, float log_ratio, float share) {
    log_ratio = log_ratio < -FAR ? -FAR : log_ratio;
    float excess = (1.0f - share) * (power_of_e(-log_ratio) - 1.0f); /* m / q - 1 */
    float value = -q * natural_log(1.0f + excess);
    return (Pair){value, value + share * q * excess / (1.0f + excess)};
}

/* |p - q| / 2; a = sign(q - p) / 2 */
INLINE Pair total_variation(float p, float q, float log_ratio, float share) {
    float gap = q - p;
    return (Pair){0.5f * fabsf(gap), gap == 0.0f ? 0.0f : q * copysignf(0.5f, gap)};
}

/* ---- logits ---- */

typedef struct { /* what is known of logits when this is compiled */
    Type type;
    int scaled, capped;
} Kind;

INLINE const void *row_of(Logits of, Kind kind, int64_t row) {
    return (const char *)of.first + row * of.stride * bytes_of(kind.type);
}

/* Behind scale and soft cap. */
INLINE float shaped(const void *row, Kind kind, Logits of, int64_t i) {
    float z = load(row, kind.type, i);
    if (kind.scaled) z *= of.scale;
    if (!kind.capped) return z;
    float twice = 2.0f * z / of.cap;
    twice = twice > FAR ? FAR : twice;
    return of.cap * (1.0f - 2.0f / (power_of_e(twice) + 1.0f)); /* cap tanh(z / cap) */
}

/* In base 2; `cool` is log2(e) / T. The highest logit is taken away first, which rounds least. */
INLINE float log_probability(float z, float cool, Normalizer of) {
    return times_plus(z - of.top, cool, -of.rest);
}

/* Lane by lane, since NaN keeps some compilers from doing so by themselves. */
INLINE float highest_of(const void *row, Kind kind, Logits of, int64_t first, int64_t last) {
    float highest[LANES], top = -INFINITY;
    for (int lane = 0; lane < LANES; lane++) highest[lane] = -INFINITY;
    for (; first + LANES <= last; first += LANES)
#pragma omp simd
        for (int lane = 0; lane < LANES; lane++) {
            float z = shaped(row, kind, of, first + lane);
            highest[lane] = z > highest[lane] ? z : highest[lane];
        }
    for (int lane = 0; lane < LANES; lane++) top = highest[lane] > top ? highest[lane] : top;
    for (; first < last; first++) {
        float z = shaped(row, kind, of, first);
        top = z > top ? z : top;
    }
    return top;
}

/* `kept` may have no room, and then keeps nothing. */
INLINE Normalizer normalizer(
    const void *row, Kind kind, Logits of, int64_t count, float cool, Powers kept) {
    float top = -INFINITY;
    double total = 0.0;
    for (int64_t first = 0; first < count; first += TILE) {
        int64_t last = first + TILE < count ? first + TILE : count;
        float highest = highest_of(row, kind, of, first, last), sum = 0.0f;
        if (highest > top) {
            total *= exp2(((double)top - highest) * cool);
            top = highest;
        }
        if (kept.tops) kept.tops[first / TILE] = top;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = first; i < last; i++) {
            float power = power_of_2((shaped(row, kind, of, i) - top) * cool);
            if (kept.of_tokens) kept.of_tokens[i] = power;
            sum += power;
        }
        total += sum;
    }
    return (Normalizer){top, (float)log2(total)};
}

/* ---- one row ---- */

static const Kind MINE = {STUDENT, STUDENT_SCALED, STUDENT_CAPPED};
static const Kind THEIRS = {TEACHER, TEACHER_SCALED, TEACHER_CAPPED};

typedef struct {
    Logits of, of_teacher;
    void *student;
    const void *teacher;
    float cool, share;
    Normalizer mine, theirs, whole; /* of the student over T, of the teacher, of the student */
    Powers my_powers, their_powers;
    float pull, label_pull, centre, total;
    int alike; /* labels are read at the same temperature, of the same tokens */
    float *scratch; /* q a of each token, or the logits of known ones */
} Row;

typedef struct { /* the student's probability of a token and the teacher's, and their log2 */
    float logq, q, logp, p;
} Token;

INLINE float logit(const Row *row, int64_t i) {
    return shaped(row->student, MINE, row->of, i);
}

/* `z` is the student's logit; the teacher is only read where the two are `compared`. */
INLINE Token logs_at(const Row *row, int64_t i, float z, int compared) {
    Token token = {.logq = log_probability(z, row->cool, row->mine)};
    if (HAS_FORM && compared) {
        float theirs = shaped(row->teacher, THEIRS, row->of_teacher, i);
        token.logp = log_probability(theirs, row->cool, row->theirs);
    }
    return token;
}

INLINE Token token_at(const Row *row, int64_t i, float z, int compared) {
    Token token = logs_at(row, i, z, compared);
    token.q = power_of_2(token.logq);
    if (HAS_FORM && compared) token.p = power_of_2(token.logp);
    return token;
}

typedef struct { /* what a tile's kept powers are multiplied by */
    float mine, theirs;
} Scales;

INLINE Scales scales_of(const Row *row, int64_t first) {
    float mine = row->my_powers.tops[first / TILE], theirs = row->their_powers.tops[first / TILE];
    return (Scales){
        power_of_2(log_probability(mine, row->cool, row->mine)),
        power_of_2(log_probability(theirs, row->cool, row->theirs)),
    };
}

/* The same as `token_at` from powers that were kept. */
INLINE Token kept_at(const Row *row, int64_t i, float z, Scales scales) {
    Token token = logs_at(row, i, z, 1);
    token.q = row->my_powers.of_tokens[i] * scales.mine;
    token.p = row->their_powers.of_tokens[i] * scales.theirs;
    return token;
}

INLINE Pair form_of(const Row *row, Token token) {
    return FORM(token.p, token.q, (token.logq - token.logp) * LN_2, row->share);
}

/* The gradient at a token but for what only its id says; `value` is added to where it is new. */
INLINE float gradient_at(
    const Row *row, int64_t i, float z, Token token, int compared, int alike, float *value) {
    float gradient = 0.0f, q = token.q;
    if (HAS_FORM && compared) {
        if (CENTRED) {
            gradient = row->pull * (row->scratch[i] - q * row->centre);
        } else {
            Pair pair = form_of(row, token);
            *value += pair.value;
            gradient = row->pull * pair.pulled;
        }
    }
    if (HAS_KNOWN) gradient += row->pull * row->total * q;
    if (HAS_LABELS && !alike) q = power_of_2(log_probability(z, LOG2_E, row->whole));
    if (HAS_LABELS) gradient += row->label_pull * q;
    return gradient;
}

/* To logits before scale and cap; `z` is behind them. */
INLINE void put(const Row *row, int64_t i, float z, float gradient) {
    if (MINE.capped) gradient *= 1.0f - (z / row->of.cap) * (z / row->of.cap);
    if (MINE.scaled) gradient *= row->of.scale;
    store(row->student, MINE.type, i, gradient);
}

/* All tokens' gradients from `first` to `last`; their values' sum. */
INLINE double finish(const Row *row, int64_t first, int64_t last, int compared, int alike) {
    double value = 0.0;
    for (; first < last; first += TILE) {
        int64_t end = first + TILE < last ? first + TILE : last;
        float sum = 0.0f;
        int kept = KEEPS && compared;
        Scales scales = {0};
        if (kept) scales = scales_of(row, first);
#pragma omp simd reduction(+ : sum)
        for (int64_t i = first; i < end; i++) {
            float z = logit(row, i), added = 0.0f;
            Token token = kept ? kept_at(row, i, z, scales)
                               : token_at(row, i, z, compared && !CENTRED);
            put(row, i, z, gradient_at(row, i, z, token, compared, alike, &added));
            sum += added;
        }
        value += sum;
    }
    return value;
}

/* The sum of values; q a goes to `scratch`, its sum to `centre`. */
INLINE double centre(Row *row, int64_t width) {
    double value = 0.0, total = 0.0;
    for (int64_t first = 0; first < width; first += TILE) {
        int64_t last = first + TILE < width ? first + TILE : width;
        float sum = 0.0f, pulled = 0.0f;
        Scales scales = {0};
        if (KEEPS) scales = scales_of(row, first);
#pragma omp simd reduction(+ : sum, pulled)
        for (int64_t i = first; i < last; i++) {
            float z = logit(row, i);
            Pair pair = form_of(row, KEEPS ? kept_at(row, i, z, scales) : token_at(row, i, z, 1));
            row->scratch[i] = pair.pulled;
            pulled += pair.pulled;
            sum += pair.value;
        }
        value += sum;
        total += pulled;
    }
    row->centre = (float)total;
    return value;
}

INLINE int is_known(int64_t id, float mass, int64_t vocabulary) {
    return mass > 0.0f && id >= 0 && id < vocabulary;
}

/* -sum mass log q; notes the masses' sum, and in `scratch` the logits. NaN, which asks for the
   definition, where an id is no token. */
INLINE double cross_entropy(
    Row *row, const int64_t *ids, const float *mass, int64_t places, int64_t vocabulary) {
    double value = 0.0, total = 0.0;
    for (int64_t k = 0; k < places; k++) {
        total += mass[k];
        if (ids[k] < 0 || ids[k] >= vocabulary) value = NAN;
        if (!is_known(ids[k], mass[k], vocabulary)) continue;
        row->scratch[k] = logit(row, ids[k]);
        value -= mass[k] * LN_2 * log_probability(row->scratch[k], row->cool, row->mine);
    }
    row->total = (float)total;
    return value;
}

/* What only known tokens get besides, behind `finish`. */
INLINE void put_known(
    Row *row, const int64_t *ids, const float *mass, int64_t places, int64_t vocabulary,
    int64_t label) {
    float unused = 0.0f;
    for (int64_t k = 0; k < places; k++) {
        if (!is_known(ids[k], mass[k], vocabulary)) continue;
        float z = row->scratch[k];
        Token token = token_at(row, ids[k], z, 1);
        float gradient = gradient_at(row, ids[k], z, token, 1, row->alike, &unused);
        gradient -= row->pull * mass[k];
        put(row, ids[k], z, ids[k] == label ? gradient - row->label_pull : gradient);
    }
}

/* All losses of rows `first_row` to `last_row`, whose gradient takes the place of the student's
   logits; `width` of its `vocabulary` tokens are compared. `cool` is 1 / T, `slope` what gradients
   are multiplied by besides. `scratch` has room for `width` numbers if CENTRED and behind them for
   2 (width + tiles) if KEEPS, or for the places of a row. */
void losses_of_rows(
    Logits student, Logits teacher, Known known, const int64_t *labels, const float *pulls,
    float *values, const float *label_pulls, float *label_values, float *scratch, int64_t first_row,
    int64_t last_row, int64_t vocabulary, int64_t width, float cool, float slope, float share) {
    for (int64_t r = first_row; r < last_row; r++) {
        Row row = {.of = student, .of_teacher = teacher, .cool = cool * LOG2_E, .share = share};
        row.student = (void *)row_of(student, MINE, r);
        row.scratch = scratch;
        if (KEEPS) {
            float *kept = scratch + (CENTRED ? width : 0), *tops = kept + 2 * width;
            row.my_powers = (Powers){kept, tops};
            row.their_powers = (Powers){kept + width, tops + (width + TILE - 1) / TILE};
        }
        const int64_t *ids = known.ids + r * known.places;
        const float *mass = known.mass + r * known.places;
        int64_t label = -1;
        float chosen = 0.0f, at_label = 0.0f, unused = 0.0f;
        double value = 0.0;
        if (HAS_FORM || HAS_KNOWN) {
            row.pull = pulls[r] * slope;
            row.mine = normalizer(row.student, MINE, student, width, row.cool, row.my_powers);
        }
        if (HAS_LABELS) {
            row.alike = (HAS_FORM || HAS_KNOWN) && cool == 1.0f && width == vocabulary;
            row.whole = row.alike
                ? row.mine
                : normalizer(row.student, MINE, student, vocabulary, LOG2_E, (Powers){0});
            label = labels[r] < vocabulary ? labels[r] : -1;
            label_values[r] = labels[r] < vocabulary ? 0.0f : NAN; /* for the definition to say */
        }
        if (label >= 0) {
            row.label_pull = label_pulls[r];
            chosen = logit(&row, label);
            label_values[r] = -LN_2 * log_probability(chosen, LOG2_E, row.whole);
        }
        if (HAS_KNOWN) value = cross_entropy(&row, ids, mass, known.places, vocabulary);
        if (HAS_FORM) {
            row.teacher = row_of(teacher, THEIRS, r);
            row.theirs =
                normalizer(row.teacher, THEIRS, teacher, width, row.cool, row.their_powers);
            if (CENTRED) value = centre(&row, width);
        }
        if (label >= 0) {
            Token token = token_at(&row, label, chosen, label < width);
            at_label = gradient_at(&row, label, chosen, token, label < width, row.alike, &unused);
            at_label -= row.label_pull;
        }
        if (row.alike) /* told apart here, so that each loop is compiled for its case */
            value += finish(&row, 0, width, 1, 1);
        else
            value += finish(&row, 0, width, 1, 0) + finish(&row, width, vocabulary, 0, 0);
        if (label >= 0) put(&row, label, chosen, at_label);
        if (HAS_KNOWN) put_known(&row, ids, mass, known.places, vocabulary, label);
        if (HAS_FORM || HAS_KNOWN) values[r] = (float)value;
    }
}
