/* GPT-2, whole, in C and its standard library: tokenizer, forward pass, cache, sampling. Written from
 * docs/implementing-gpt2.md alone, whose sections are the numbers below; speaks the protocol of docs/conform.md.
 *
 *     cc -O3 -march=native -o gpt2 examples/gpt2.c -lm
 *     echo "greedy 8 8 51 78 307 393 407 284 307" | ./gpt2 reference/model
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define die(...) (fprintf(stderr, "gpt2: " __VA_ARGS__), fputc('\n', stderr), exit(2))

enum { LIMIT = 4096 }; /* numbers in a request */

typedef unsigned char byte;
typedef struct { const byte *bytes; int size, id; } Token;

static const struct { char kind; unsigned first, last; } CLASSES[] = {
#include "../reference/unicode_classes.txt"
};

static int n_vocab, n_ctx, n_embd, n_head, n_layer;
static Token *tokens, *sorted;  /* [n_vocab] by id; [n_vocab - 1] by bytes, without <|endoftext|> */
static char *header;            /* of model.safetensors, */
static byte *weights;           /* and the n_weights bytes behind it */
static size_t n_weights;
static float *cache;            /* q, k and v of n_past tokens [n_layer, n_ctx, 3*n_embd]; an old q is never read */
static int n_past;
static float *x, *y, *z, *wide; /* the stream, what a layer takes, what it gives [n_ctx, n_embd]; [n_ctx, 4*n_embd] */
static float *pattern;          /* the scores of a query and their softmax [n_ctx] */
static double *logits;          /* [n_vocab] */

static void *allocate(size_t count, size_t size) {
    void *memory = calloc(count + 1, size); /* one more, for the 0 behind a text */
    if (!memory) die("no memory for %zu times %zu bytes", count, size);
    return memory;
}

static byte *read_file(const char *directory, const char *name, size_t *size) {
    char path[4096];
    snprintf(path, sizeof path, "%s/%s", directory, name);
    FILE *file = fopen(path, "rb");
    if (!file || fseek(file, 0, SEEK_END)) die("cannot open %s", path);
    byte *bytes = allocate(*size = ftell(file), 1);
    rewind(file);
    if (fread(bytes, 1, *size, file) != *size) die("cannot read %s", path);
    fclose(file);
    return bytes;
}

/* 0. What follows a key of JSON, or "". Any prefix will do: transformer.wte.weight is found as wte.weight. */
static const char *json_value(const char *json, const char *key) {
    char quoted[100];
    int size = snprintf(quoted, sizeof quoted, "%s\":", key);
    const char *at = strstr(json, quoted);
    return at ? at + size : "";
}

static int config_number(const char *config, const char *key) {
    int number = 0;
    if (sscanf(json_value(config, key), "%d", &number) != 1 || number < 1) die("config.json: no %s", key);
    return number;
}

static void load_model(const char *directory) {
    size_t n = 0;
    char *config = (char *)read_file(directory, "config.json", &n_weights);
    n_vocab = config_number(config, "vocab_size"), n_ctx = config_number(config, "n_positions");
    n_embd = config_number(config, "n_embd"), n_head = config_number(config, "n_head");
    n_layer = config_number(config, "n_layer");
    if (n_embd % n_head) die("config.json: n_head does not divide n_embd");
    free(config);
    weights = read_file(directory, "model.safetensors", &n_weights);
    for (int i = 8; n_weights > 8 && i--;) n = n << 8 | weights[i];
    if (n_weights <= 8 || n > n_weights - 8 || weights[8] != '{') die("model.safetensors is no safetensors file");
    header = memcpy(allocate(n, 1), weights + 8, n);
    memmove(weights, weights + 8 + n, n_weights -= 8 + n); /* to where floats may be */
    size_t row = n_embd * sizeof(float);
    x = allocate(n_ctx, row), y = allocate(n_ctx, row), z = allocate(n_ctx, row), wide = allocate(n_ctx, 4 * row);
    cache = allocate((size_t)n_layer * n_ctx, 3 * row);
    pattern = allocate(n_ctx, sizeof *pattern), logits = allocate(n_vocab, sizeof *logits);
}

/* The weight or bias of a layer, whose name has a %d for block i: [rows, columns], or [columns] where rows is 1 */
static const float *tensor(const char *layer, int i, const char *part, int rows, int columns) {
    char name[100], dtype[4] = "";
    snprintf(name, sizeof name - 8, layer, i);
    const char *entry = json_value(header, strcat(name, part));
    int r = 1, c = 0;
    size_t begin = 0, end = 0, size = sizeof(float) * rows * columns;
    sscanf(json_value(entry, "dtype"), " \"%3s", dtype);
    if (sscanf(json_value(entry, "shape"), " [ %d , %d", &r, &c) == 1) c = r, r = 1;
    sscanf(json_value(entry, "data_offsets"), " [ %zu , %zu", &begin, &end);
    if (!*entry) die("model.safetensors has no %s", name);
    if (strcmp(dtype, "F32") || r != rows || c != columns || begin > end || end - begin != size || begin % 4)
        die("%s should be F32, [%d, %d], not %.*s}", name, rows, columns, (int)strcspn(entry, "}"), entry);
    if (end > n_weights) die("model.safetensors ends before %s does", name);
    return (float *)(weights + begin); /* little-endian, as all machines are that this is likely to meet */
}

/* 1.2. One character of UTF-8 */
static unsigned code_point(const byte **at) {
    unsigned c = **at < 0xC0 ? **at : **at < 0xE0 ? **at & 31u : **at < 0xF0 ? **at & 15u : **at & 7u;
    while ((*++*at & 0xC0) == 0x80) c = c << 6 | (**at & 63u); /* the 0 behind the text ends this */
    return c;
}

static char kind_of(unsigned c) {
    for (size_t i = 0; i < sizeof CLASSES / sizeof *CLASSES; i++)
        if (CLASSES[i].first <= c && c <= CLASSES[i].last) return CLASSES[i].kind;
    return 'r'; /* the rest */
}

/* 1.2. kinds has for each byte the kind of its character, and behind the text a 0, at which every run ends. */
static int end_of_piece(const byte *text, const char *kinds, int i) {
    static const char *endings[] = {"'s", "'t", "'re", "'ve", "'m", "'ll", "'d"};
    for (int n = 0; n < 7; n++)
        if (memcmp(text + i, endings[n], strlen(endings[n])) == 0) return i + strlen(endings[n]);
    int j = text[i] == ' ' && kinds[i + 1] && kinds[i + 1] != 's' ? i + 1 : i, end = j, last = j;
    for (; kinds[end] == kinds[j]; end++)
        if ((text[end] & 0xC0) != 0x80) last = end; /* where the run's last character begins */
    return kinds[j] == 's' && kinds[end] && last > i ? last : end;
}

static int compare_tokens(const void *left, const void *right) {
    const Token *a = left, *b = right;
    int order = memcmp(a->bytes, b->bytes, a->size < b->size ? a->size : b->size);
    return order ? order : a->size - b->size;
}

static int find(const byte *bytes, int size) {
    Token key = {bytes, size, 0}, *found = bsearch(&key, sorted, n_vocab - 1, sizeof key, compare_tokens);
    return found ? found->id : n_vocab; /* higher than any */
}

/* 1.3. Part i of the piece has the bytes from parts[i] to parts[i + 1]. In the end its id takes its place. */
static int merge(const byte *piece, int n, int *parts) {
    for (int i = 0; i <= n; i++) parts[i] = i;
    for (;;) {
        int lowest = n_vocab, place = 0;
        for (int i = 0; i + 2 <= n; i++) {
            int id = find(piece + parts[i], parts[i + 2] - parts[i]);
            if (id < lowest) lowest = id, place = i;
        }
        if (lowest == n_vocab) break;
        memmove(parts + place + 1, parts + place + 2, (n-- - place - 1) * sizeof *parts);
    }
    for (int i = 0; i < n; i++) parts[i] = find(piece + parts[i], parts[i + 1] - parts[i]);
    return n;
}

/* 1. From bytes to ids, in place */
static int encode(int *ids, int size) {
    byte text[LIMIT + 4] = "";
    char kinds[LIMIT + 1] = "";
    int n = 0;
    for (int i = 0; i < size; i++) text[i] = ids[i];
    for (const byte *at = text, *start = at; at < text + size; start = at) {
        char kind = kind_of(code_point(&at));
        memset(kinds + (start - text), kind, at - start);
    }
    for (int i = 0, end; i < size; i = end) {
        end = end_of_piece(text, kinds, i);
        n += merge(text + i, end - i, ids + n);
    }
    return n;
}

/* 1.1. The merge of rank k makes the token 256 + k. */
static void load_tokens(const char *directory) {
    static const int ranges[6][2] = {{33, 126}, {161, 172}, {174, 255}, {0, 32}, {127, 160}, {173, 173}};
    static byte single[256];
    size_t size;
    char *line = (char *)read_file(directory, "merges.txt", &size);
    int byte_of[324], n = 0, other = 256;
    memset(byte_of, -1, sizeof byte_of);
    tokens = allocate(257 + size / 3, sizeof(Token));
    for (int r = 0; r < 6; r++)
        for (int b = ranges[r][0]; b <= ranges[r][1]; b++, n++) {
            byte_of[r < 3 ? b : other++] = single[n] = b;
            tokens[n] = (Token){single + n, 1, n};
        }
    strtok(line, "\n"); /* the version */
    for (; (line = strtok(NULL, "\r\n")); n++) { /* its symbols, turned back into bytes, are the token */
        byte *end = (byte *)line;
        for (const byte *at = end; *at;) {
            unsigned c = code_point(&at);
            if (c < 324 && byte_of[c] >= 0) *end++ = byte_of[c];
        }
        tokens[n] = (Token){(byte *)line, end - (byte *)line, n};
    }
    sorted = memcpy(allocate(n, sizeof(Token)), tokens, n * sizeof(Token));
    qsort(sorted, n, sizeof(Token), compare_tokens);
    tokens[n] = (Token){(const byte *)"<|endoftext|>", 13, n};
    if (n + 1 != n_vocab) die("merges.txt makes %d tokens, vocab_size is %d", n + 1, n_vocab);
}

/* 2.2. out [n, n_embd]: the rows of in with mean 0 and variance 1, times weight, plus bias */
static void layer_norm(float *out, const float *in, int n, const char *name, int i) {
    const float *weight = tensor(name, i, ".weight", 1, n_embd), *bias = tensor(name, i, ".bias", 1, n_embd);
    for (; n--; in += n_embd, out += n_embd) {
        float mean = 0, variance = 0;
        for (int j = 0; j < n_embd; j++) mean += in[j] / n_embd;
        for (int j = 0; j < n_embd; j++) variance += (in[j] - mean) * (in[j] - mean) / n_embd;
        float scale = sqrtf(variance + 1e-5f);
        for (int j = 0; j < n_embd; j++) out[j] = (in[j] - mean) / scale * weight[j] + bias[j];
    }
}

/* 2.3. out [n, n_out] = in [n, n_in] weight + bias. The weight goes by once, row by row, as memory likes it. */
static void linear(float *restrict out, const float *restrict in, int n, const char *name, int i, int n_in, int n_out) {
    const float *weight = tensor(name, i, ".weight", n_in, n_out), *bias = tensor(name, i, ".bias", 1, n_out);
    for (int t = 0; t < n; t++) memcpy(out + t * n_out, bias, n_out * sizeof *out);
    for (int j = 0; j < n_in; j++, weight += n_out)
        for (int t = 0; t < n; t++)
            for (int o = 0; o < n_out; o++) out[t * n_out + o] += in[t * n_in + j] * weight[o];
}

/* 2.4. out [n, n_embd], head beside head: what the last n rows of qkv [n_past + n, 3*n_embd] find in all rows */
static void attention(float *out, const float *qkv, int n) {
    int d = n_embd / n_head, row = 3 * n_embd;
    const float *q = qkv + n_past * row, *k = qkv + n_embd, *v = qkv + 2 * n_embd;
    memset(out, 0, n * n_embd * sizeof *out);
    for (int last = n_past; last < n_past + n; last++, q += row, out += n_embd)
        for (int h = 0; h < n_embd; h += d) { /* the head of the columns from h to h + d */
            float largest = -INFINITY, sum = 0;
            for (int s = 0; s <= last; s++) {
                float score = 0;
                for (int j = h; j < h + d; j++) score += q[j] * k[s * row + j];
                pattern[s] = score / sqrtf(d);
                largest = fmaxf(largest, pattern[s]);
            }
            for (int s = 0; s <= last; s++) sum += pattern[s] = expf(pattern[s] - largest);
            for (int s = 0; s <= last; s++) {
                pattern[s] /= sum;
                for (int j = h; j < h + d; j++) out[j] += pattern[s] * v[s * row + j];
            }
        }
}

/* 2.6. The form with tanh */
static float gelu(float a) {
    return 0.5f * a * (1 + tanhf(0.7978845608f * (a + 0.044715f * a * a * a)));
}

/* 2 and 4. Reads n more tokens: leaves their rows of the stream in x, and their keys and values in the cache. */
static void forward(const int *ids, int n) {
    const float *wte = tensor("wte", 0, ".weight", n_vocab, n_embd), *wpe = tensor("wpe", 0, ".weight", n_ctx, n_embd);
    if (n < 1 || n > n_ctx - n_past) die("%d tokens after %d, but %d positions", n, n_past, n_ctx);
    for (int t = 0; t < n; t++) {
        if (ids[t] < 0 || ids[t] >= n_vocab) die("%d is no token", ids[t]);
        for (int j = 0; j < n_embd; j++)
            x[t * n_embd + j] = wte[(size_t)ids[t] * n_embd + j] + wpe[(n_past + t) * n_embd + j];
    }
    for (int i = 0; i < n_layer; i++) {
        float *qkv = cache + (size_t)i * n_ctx * 3 * n_embd;
        layer_norm(y, x, n, "h.%d.ln_1", i);
        linear(qkv + n_past * 3 * n_embd, y, n, "h.%d.attn.c_attn", i, n_embd, 3 * n_embd);
        attention(y, qkv, n);
        linear(z, y, n, "h.%d.attn.c_proj", i, n_embd, n_embd);
        for (int j = 0; j < n * n_embd; j++) x[j] += z[j];
        layer_norm(y, x, n, "h.%d.ln_2", i);
        linear(wide, y, n, "h.%d.mlp.c_fc", i, n_embd, 4 * n_embd);
        for (int j = 0; j < n * 4 * n_embd; j++) wide[j] = gelu(wide[j]);
        linear(z, wide, n, "h.%d.mlp.c_proj", i, 4 * n_embd, n_embd);
        for (int j = 0; j < n * n_embd; j++) x[j] += z[j];
    }
    n_past += n;
}

/* 2.7. What follows row t of the stream: ln_f(x[t]) wte^T */
static const double *logits_after(int t) {
    const float *wte = tensor("wte", 0, ".weight", n_vocab, n_embd);
    layer_norm(y, x + t * n_embd, 1, "ln_f", 0);
    for (int i = 0; i < n_vocab; i++, wte += n_embd) {
        logits[i] = 0;
        for (int j = 0; j < n_embd; j++) logits[i] += y[j] * wte[j];
    }
    return logits;
}

/* 6. From the definitions, in the square of n steps; sort first if your n is large. The logits are called l. */
static int sample(const double *l, int n, double temperature, int top_k, double top_p, double u) {
    double p[LIMIT], kept[LIMIT], total = 0, last = 0, so_far = 0;
    int id = 0;
    for (int i = 1; i < n; i++)
        if (l[i] > l[id]) id = i;
    if (temperature == 0) return id;
    double largest = l[id];
    for (int i = 0; i < n; i++) {
        int larger = 0;
        for (int j = 0; j < n; j++) larger += l[j] > l[i];
        total += p[i] = top_k == 0 || larger < top_k ? exp((l[i] - largest) / temperature) : 0;
    }
    for (int i = 0; i < n; i++) {
        double before = 0;
        for (int j = 0; j < n; j++) before += p[j] > p[i] || (p[j] == p[i] && j < i) ? p[j] / total : 0;
        last += kept[i] = top_p == 1 || before < top_p ? p[i] : 0;
    }
    for (int i = 0; i < n && so_far <= u * last; i++)
        if (kept[i] > 0) so_far += kept[id = i];
    return id;
}

/* docs/conform.md */
static void answer(const char *word, const double *numbers, int *ids, int n) {
#define IS(name) (strcmp(word, name) == 0)
    if (!IS("step")) n_past = 0;
    if (IS("encode")) {
        n = encode(ids, n);
        for (int i = 0; i < n; i++) printf("%d ", ids[i]);
    } else if (IS("decode")) {
        for (int i = 0; i < n; i++) {
            if (ids[i] < 0 || ids[i] >= n_vocab) die("%d is no token", ids[i]);
            for (int j = 0; j < tokens[ids[i]].size; j++) printf("%d ", tokens[ids[i]].bytes[j]);
        }
    } else if (IS("logits") || IS("all_logits") || IS("start") || IS("step")) {
        forward(ids, n);
        for (int t = IS("all_logits") ? 0 : n - 1; t < n; t++) {
            const double *l = logits_after(t);
            for (int i = 0; i < n_vocab; i++) printf("%.9g ", l[i]);
        }
    } else if (IS("greedy")) {
        for (int i = 0, rows = n - 1; i < ids[0]; i++, rows = 1) {
            forward(ids + 1, rows);
            printf("%d ", ids[1] = sample(logits_after(rows - 1), n_vocab, 0, 0, 1, 0));
        }
    } else if (IS("sample")) {
        printf("%d", sample(numbers + 4, n - 4, numbers[0], numbers[1], numbers[2], numbers[3]));
    } else
        printf("?");
}

int main(int argc, char **argv) {
    static double numbers[LIMIT + 4];
    static int ids[LIMIT + 1];
    char word[32];
    if (argc != 2) die("usage: gpt2 MODEL_DIRECTORY");
    load_model(argv[1]);
    load_tokens(argv[1]);
    forward(ids, 1), logits_after(0); /* asks for every tensor: what is missing is missing now, not later */
    for (int n; scanf("%31s %d", word, &n) == 2; puts(""), fflush(stdout)) {
        if (n < 0 || n > LIMIT) die("%s: not %d numbers, but up to %d", word, n, LIMIT);
        for (int i = 0; i < n; i++) {
            if (scanf("%lf", &numbers[i]) != 1) die("%s: %d numbers promised, %d came", word, n, i);
            ids[i] = fabs(numbers[i]) < 1e9 ? numbers[i] : -1;
        }
        answer(word, numbers, ids, n);
    }
    if (!feof(stdin)) die("a request is a word, how many numbers follow, and the numbers");
    return 0;
}
