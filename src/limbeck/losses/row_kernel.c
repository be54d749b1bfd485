/* Rows of logits on a CPU: see cpu.py, which compiles this once for each choice of its parts.

   A row's powers of 2 are taken once and kept, and what follows reads those. The gradient takes the
   place of the student's logits, and so do its powers where they can: what a row needs should stay
   in a core's own cache. FORM is one of the functions below; it gives phi and q a of a
   token, where the loss is sum_i phi(p_i, q_i) and a = dphi / dq, shifted so that equal models have
   exactly 0, which changes nothing else. The gradient in the logits over T is q (a - <q, a>). The
   forms are those of row_kernel.py, less the forward KL: that one is found on the way.

   HAS_LOGITS, HAS_KNOWN, HAS_LABELS   a teacher's logits, or a few of its tokens; labels
   CENTRED                             whether <q, a> has to be found, for which there is FORM
   STUDENT, STUDENT_SCALED, STUDENT_CAPPED, and of TEACHER: the type of logits, and what they need
   TILE                                tokens summed in float32; their sums are in float64
   LANES                               as many numbers as a few vectors hold
   FAR                                 log-ratio beyond which a power would overflow

   Loops are plain ones that a compiler turns into vector code. Probabilities are powers of 2, of
   logits times log2(e). */

#include <math.h>

#include "numbers.h"

#define LOG2_E 1.44269504f
#define LN_2 0.693147181f
#define FAR_BITS (FAR * LOG2_E)

#define LINE 64 /* bytes of the cache */
#define AHEAD 2 /* tiles */
#define IN_PLACE (HAS_LOGITS && STUDENT == float32 && !STUDENT_CAPPED && !CENTRED)

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

/* ---- forms: (p, q, log2 q - log2 p, share) -> phi and q a ---- */

typedef struct {
    float value, pulled;
} Pair;

/* q log(q / p); a = log(q / p) */
INLINE Pair reverse_kl(float p, float q, float bits, float share) {
    return (Pair){q * bits * LN_2, q * bits * LN_2};
}

/* share p log(p / m) + (1 - share) q log(q / m); a = (1 - share) log(q / m) */
INLINE Pair jensen_shannon(float p, float q, float bits, float share) {
    bits = bits > FAR_BITS ? FAR_BITS : bits;
    float log_mixture = natural_log(1.0f + (1.0f - share) * (power_of_2(bits) - 1.0f));
    float pulled = (1.0f - share) * q * times_plus(bits, LN_2, -log_mixture); /* log m - log p */
    return (Pair){pulled - share * p * log_mixture, pulled};
}

/* p log(p / m); a = (1 - share) (m - p) / m */
INLINE Pair skew_forward_kl(float p, float q, float bits, float share) {
    bits = bits > FAR_BITS ? FAR_BITS : bits;
    float excess = (1.0f - share) * (power_of_2(bits) - 1.0f); /* m / p - 1 */
    return (Pair){-p * natural_log(1.0f + excess), (1.0f - share) * q * excess / (1.0f + excess)};
}

/* q log(q / m); a = log(q / m) + share (m - q) / m */
INLINE Pair skew_reverse_kl(float p, float q, float bits, float share) {
    bits = bits < -FAR_BITS ? -FAR_BITS : bits;
    float excess = (1.0f - share) * (power_of_2(-bits) - 1.0f); /* m / q - 1 */
    float value = -q * natural_log(1.0f + excess);
    return (Pair){value, value + share * q * excess / (1.0f + excess)};
}

/* |p - q| / 2; a = sign(q - p) / 2 */
INLINE Pair total_variation(float p, float q, float bits, float share) {
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
    for (int half = LANES / 2; half > 0; half /= 2)
#pragma omp simd
        for (int lane = 0; lane < half; lane++) {
            float other = highest[lane + half];
            highest[lane] = highest[lane] > other ? highest[lane] : other;
        }
    top = highest[0];
    for (; first < last; first++) {
        float z = shaped(row, kind, of, first);
        top = z > top ? z : top;
    }
    return top;
}

/* Ask for the tile AHEAD of the one that begins at `first`: behind a row's end that is the next row,
   and behind the last one nothing, which does no harm. Memory works while the processor does. */
INLINE void fetch_ahead(const void *row, Kind kind, int64_t first) {
    const char *from = (const char *)row + (first + AHEAD * TILE) * bytes_of(kind.type);
    for (int64_t at = 0; at < TILE * bytes_of(kind.type); at += LINE) __builtin_prefetch(from + at);
}

/* ---- probabilities ---- */

typedef struct { /* of a row: log2 p = (z - top) cool - rest, where `top` is the highest logit */
    float cool; /* log2(e) / T */
    float top, rest, inverse; /* the last one is 2^-rest, rounded less */
    float *powers; /* of each token 2^((z - top) cool), where each tile of them has its own top */
    float *tops;
} Softened;

/* The highest logit is taken away first, which rounds least. */
INLINE float log_probability(float z, Softened of) {
    return times_plus(z - of.top, of.cool, -of.rest);
}

/* What the powers of a token's tile are multiplied by to be probabilities. */
INLINE float scale_at(Softened of, int64_t token) {
    return power_of_2((of.tops[token / TILE] - of.top) * of.cool) * of.inverse;
}

/* Notes the top of the tile that begins at `first`; sums of earlier powers count so much now. */
INLINE double raise(Softened *of, int64_t first, float highest) {
    double shrunk = 1.0;
    if (highest > of->top) {
        shrunk = exp2(((double)of->top - highest) * of->cool);
        of->top = highest;
    }
    of->tops[first / TILE] = of->top;
    return shrunk;
}

INLINE void note_total(Softened *of, double total) {
    of->rest = (float)log2(total);
    of->inverse = (float)(1.0 / total);
}

INLINE void soften(Softened *of, const void *row, Kind kind, Logits logits, int64_t count) {
    double total = 0.0;
    for (int64_t first = 0; first < count; first += TILE) {
        int64_t last = first + TILE < count ? first + TILE : count;
        float sum = 0.0f;
        fetch_ahead(row, kind, first);
        total *= raise(of, first, highest_of(row, kind, logits, first, last));
        float top = of->top;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = first; i < last; i++) {
            float power = power_of_2((shaped(row, kind, logits, i) - top) * of->cool);
            of->powers[i] = power;
            sum += power;
        }
        total += sum;
    }
    note_total(of, total);
}

/* ---- one row ---- */

static const Kind MINE = {STUDENT, STUDENT_SCALED, STUDENT_CAPPED};
static const Kind THEIRS = {TEACHER, TEACHER_SCALED, TEACHER_CAPPED};

typedef struct {
    Logits of, of_teacher;
    void *student;
    const void *teacher;
    Softened mine, theirs, whole; /* the student over T, the teacher over T, all of the student */
    float share, pull, label_pull, centre, total;
    float *known_logits;
} Row;

INLINE float logit(const Row *row, int64_t i) {
    return shaped(row->student, MINE, row->of, i);
}

/* Both models' powers; returns KL(p || q), for which no further look at the logits is needed:
   log2(p / q) = (z_p - z_q) cool - log2(sum of p's powers / sum of q's), and p adds up to 1. */
INLINE double soften_both(Row *row, int64_t width) {
    Softened *mine = &row->mine, *theirs = &row->theirs;
    double my_total = 0.0, their_total = 0.0, gap_total = 0.0;
    float cool = mine->cool;
    for (int64_t first = 0; first < width; first += TILE) {
        int64_t last = first + TILE < width ? first + TILE : width;
        fetch_ahead(row->student, MINE, first);
        fetch_ahead(row->teacher, THEIRS, first);
        my_total *= raise(mine, first, highest_of(row->student, MINE, row->of, first, last));
        double shrunk =
            raise(theirs, first, highest_of(row->teacher, THEIRS, row->of_teacher, first, last));
        float my_top = mine->top, their_top = theirs->top;
        float my_sum = 0.0f, their_sum = 0.0f, gaps = 0.0f;
#pragma omp simd reduction(+ : my_sum, their_sum, gaps)
        for (int64_t i = first; i < last; i++) {
            float my_z = logit(row, i) - my_top;
            float their_z = shaped(row->teacher, THEIRS, row->of_teacher, i) - their_top;
            float my_power = power_of_2(my_z * cool), their_power = power_of_2(their_z * cool);
            mine->powers[i] = my_power;
            theirs->powers[i] = their_power;
            my_sum += my_power;
            their_sum += their_power;
            gaps += their_power * (their_z - my_z);
        }
        my_total += my_sum;
        their_total = their_total * shrunk + their_sum;
        gap_total = gap_total * shrunk + gaps + their_sum * ((double)their_top - my_top);
    }
    note_total(mine, my_total);
    note_total(theirs, their_total);
    double gap = gap_total / their_total - ((double)theirs->top - mine->top);
    return LN_2 * gap * cool - log(their_total / my_total);
}

#if CENTRED
/* The sum of phi; q a takes the place of the teacher's powers, its sum goes to `centre`. */
INLINE double centre(Row *row, int64_t width) {
    double value = 0.0, total = 0.0;
    float cool = row->mine.cool;
    float apart = (float)(((double)row->theirs.top - row->mine.top) * cool
                          + ((double)row->theirs.rest - row->mine.rest)); /* 0 for equal models */
    for (int64_t first = 0; first < width; first += TILE) {
        int64_t last = first + TILE < width ? first + TILE : width;
        float my_scale = scale_at(row->mine, first), their_scale = scale_at(row->theirs, first);
        float sum = 0.0f, pulled = 0.0f;
#pragma omp simd reduction(+ : sum, pulled)
        for (int64_t i = first; i < last; i++) {
            float their_z = shaped(row->teacher, THEIRS, row->of_teacher, i);
            float bits = times_plus(logit(row, i) - their_z, cool, apart);
            float q = row->mine.powers[i] * my_scale, p = row->theirs.powers[i] * their_scale;
            Pair pair = FORM(p, q, bits, row->share);
            row->theirs.powers[i] = pair.pulled;
            pulled += pair.pulled;
            sum += pair.value;
        }
        value += sum;
        total += pulled;
    }
    row->centre = (float)total;
    return value;
}
#endif

typedef struct { /* of a tile's powers */
    float mine, theirs, whole;
} Scales;

INLINE Scales scales_at(const Row *row, int64_t token, int compared) {
    Scales scales = {0};
    if ((HAS_LOGITS || HAS_KNOWN) && compared) scales.mine = scale_at(row->mine, token);
    if (HAS_LOGITS && !CENTRED && compared) scales.theirs = scale_at(row->theirs, token);
    if (HAS_LABELS) scales.whole = scale_at(row->whole, token);
    return scales;
}

/* The gradient at a token but for what only its id says. Tokens of no teacher are not `compared`. */
INLINE float gradient_at(const Row *row, int64_t i, Scales scales, int compared) {
    float gradient = 0.0f;
    if (HAS_LOGITS && compared) {
        float q = row->mine.powers[i] * scales.mine, theirs = row->theirs.powers[i];
        gradient = row->pull * (CENTRED ? theirs - q * row->centre : q - theirs * scales.theirs);
    }
    if (HAS_KNOWN) gradient = row->pull * row->total * row->mine.powers[i] * scales.mine;
    if (HAS_LABELS) gradient += row->label_pull * row->whole.powers[i] * scales.whole;
    return gradient;
}

/* To logits before scale and cap; `z` is behind them. */
INLINE void put(const Row *row, int64_t i, float z, float gradient) {
    if (MINE.capped) gradient *= 1.0f - (z / row->of.cap) * (z / row->of.cap);
    if (MINE.scaled) gradient *= row->of.scale;
    store(row->student, MINE.type, i, gradient);
}

/* The gradient at the tokens from `first`, where a tile begins unless `compared` changes there. */
INLINE void finish(const Row *row, int64_t first, int64_t last, int compared) {
    while (first < last) {
        int64_t end = (first / TILE + 1) * TILE < last ? (first / TILE + 1) * TILE : last;
        Scales scales = scales_at(row, first, compared);
#pragma omp simd
        for (int64_t i = first; i < end; i++)
            put(row, i, logit(row, i), gradient_at(row, i, scales, compared));
        first = end;
    }
}

INLINE int is_known(int64_t id, float mass, int64_t vocabulary) {
    return mass > 0.0f && id >= 0 && id < vocabulary;
}

/* -sum mass log q; notes the masses' sum, and the logits, which the gradient replaces. NaN, which
   asks for the definition, where an id is no token. */
INLINE double cross_entropy(
    Row *row, const int64_t *ids, const float *mass, int64_t places, int64_t vocabulary) {
    double value = 0.0, total = 0.0;
    for (int64_t k = 0; k < places; k++) {
        total += mass[k];
        if (ids[k] < 0 || ids[k] >= vocabulary) value = NAN;
        if (!is_known(ids[k], mass[k], vocabulary)) continue;
        row->known_logits[k] = logit(row, ids[k]);
        value -= mass[k] * LN_2 * log_probability(row->known_logits[k], row->mine);
    }
    row->total = (float)total;
    return value;
}

/* What only known tokens get besides, behind `finish`. */
INLINE void put_known(
    Row *row, const int64_t *ids, const float *mass, int64_t places, int64_t vocabulary,
    int64_t label) {
    for (int64_t k = 0; k < places; k++) {
        if (!is_known(ids[k], mass[k], vocabulary)) continue;
        float gradient = gradient_at(row, ids[k], scales_at(row, ids[k], 1), 1);
        gradient -= row->pull * mass[k];
        if (ids[k] == label) gradient -= row->label_pull;
        put(row, ids[k], row->known_logits[k], gradient);
    }
}

/* Room for a row's powers, taken from what is left of `scratch`. */
INLINE Softened room(float **scratch, int64_t count, float cool) {
    int64_t tiles = (count + TILE - 1) / TILE;
    Softened of = {.cool = cool, .top = -INFINITY, .powers = *scratch};
    of.tops = of.powers + tiles * TILE;
    *scratch += tiles * TILE + (tiles + LANES - 1) / LANES * LANES;
    return of;
}

/* All losses of rows `first_row` to `last_row`, whose gradient takes the place of the student's
   logits; `width` of its `vocabulary` tokens are compared. `cool` is 1 / T, `slope` what gradients
   are multiplied by besides. `scratch` has room for three rows' powers and their tops, all in
   whole tiles and lanes, and for the places of a row. */
void losses_of_rows(
    Logits student, Logits teacher, Known known, const int64_t *labels, const float *pulls,
    float *values, const float *label_pulls, float *label_values, float *scratch, int64_t first_row,
    int64_t last_row, int64_t vocabulary, int64_t width, float cool, float slope, float share) {
    int alike = (HAS_LOGITS || HAS_KNOWN) && cool == 1.0f && width == vocabulary;
    Softened mine = room(&scratch, width, cool * LOG2_E);
    Softened theirs = room(&scratch, width, cool * LOG2_E);
    Softened whole = room(&scratch, vocabulary, LOG2_E);
    for (int64_t r = first_row; r < last_row; r++) {
        Row row = {.of = student, .of_teacher = teacher, .share = share, .known_logits = scratch};
        row.mine = mine, row.theirs = theirs, row.whole = whole;
        row.student = (void *)row_of(student, MINE, r);
        row.teacher = row_of(teacher, THEIRS, r);
        const int64_t *ids = known.ids + r * known.places;
        const float *mass = known.mass + r * known.places;
        int64_t label = -1;
        float chosen = 0.0f, at_label = 0.0f;
        double value = 0.0;
        if (HAS_LABELS) {
            label = labels[r] < vocabulary ? labels[r] : -1;
            if (label >= 0) chosen = logit(&row, label);
            if (!alike) soften(&row.whole, row.student, MINE, student, vocabulary);
        }
        if (HAS_LOGITS || HAS_KNOWN) row.pull = pulls[r] * slope;
        if (IN_PLACE) row.mine.powers = row.student; /* its logits are not read again */
        if (HAS_LOGITS) value = soften_both(&row, width);
#if CENTRED
        value = centre(&row, width);
#endif
        if (HAS_KNOWN) {
            soften(&row.mine, row.student, MINE, student, width);
            value = cross_entropy(&row, ids, mass, known.places, vocabulary);
        }
        if (alike) row.whole = row.mine;
        if (HAS_LABELS) label_values[r] = labels[r] < vocabulary ? 0.0f : NAN; /* to be looked at */
        if (label >= 0) {
            int compared = label < width;
            row.label_pull = label_pulls[r];
            label_values[r] = -LN_2 * log_probability(chosen, row.whole);
            at_label = gradient_at(&row, label, scales_at(&row, label, compared), compared);
        }
        finish(&row, 0, width, 1);
        finish(&row, width, vocabulary, 0);
        if (label >= 0) put(&row, label, chosen, at_label - row.label_pull);
        if (HAS_KNOWN) put_known(&row, ids, mass, known.places, vocabulary, label);
        if (HAS_LOGITS || HAS_KNOWN) values[r] = (float)value;
    }
}
