/* The C interface, for C and for every language that can call it.
 *
 * Functions return MSC_OK or what went wrong; then msc_last_error() says so in one sentence, and outputs are
 * unchanged. A handle may be used by one thread at a time; two threads may use two sessions of one bundle at once.
 * Sessions outlive the bundle they were opened from. Closing NULL does nothing.
 */
#ifndef MSCOMPILE_MSCOMPILE_H
#define MSCOMPILE_MSCOMPILE_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef enum msc_status {
    MSC_OK = 0,
    MSC_BAD_INPUT = 2, /* a bundle, option or tokens that cannot work */
    MSC_ENGINE = 3     /* an engine failed, or cannot run on this machine */
} msc_status;

typedef struct msc_bundle msc_bundle;
typedef struct msc_session msc_session;
typedef struct msc_snapshot msc_snapshot;

/* Supplies one host input: reads `count` completed chunks, (count, every) token ids, writes the entries
 * (count, *shape) of the input's dtype, and returns 0; anything else fails the step, with nothing consumed. */
typedef int (*msc_source)(const int64_t* chunks, int64_t count, void* entries, void* user);

typedef struct msc_named_source {
    const char* name;
    msc_source source;
    void* user;
} msc_named_source;

/* Zeros are the defaults, except for `batch`. */
typedef struct msc_options {
    const char* engine;  /* of the bundle; NULL: the first that this library can run */
    const char* library; /* of the runtime; NULL: $MSCOMPILE_ONNXRUNTIME, Python's, or the system's */
    int64_t batch;       /* streams, at least 1 */
    int threads;         /* of one call; 0: as many as the runtime likes */
    const msc_named_source* sources;
    size_t source_count;
} msc_options;

/* Why the last call in this thread failed; empty if none has. Valid until the next call in this thread. */
const char* msc_last_error(void);

/* Opens a bundle and holds every file against its hash; without `hash_files`, only those of up to 64 MiB. */
msc_status msc_bundle_open(const char* path, int hash_files, msc_bundle** bundle);
void msc_bundle_close(msc_bundle* bundle);

/* Token ids of a UTF-8 text. `ids` has room for `capacity`; `count` becomes their number, also where they do not
 * fit, which fails. With a capacity of 0 and NULL it only counts. */
msc_status msc_encode(const msc_bundle* bundle, const char* text, int64_t* ids, size_t capacity, size_t* count);

/* The UTF-8 text of `count` ids, with a final 0. `length` becomes the bytes needed, the 0 included. */
msc_status msc_decode(const msc_bundle* bundle, const int64_t* ids, size_t count, char* text, size_t capacity,
                      size_t* length);

/* A new group of streams at position 0. */
msc_status msc_session_open(msc_bundle* bundle, const msc_options* options, msc_session** session);
void msc_session_close(msc_session* session);

int64_t msc_session_batch(const msc_session* session);
int64_t msc_session_vocab_size(const msc_session* session);

/* Tokens consumed by each row since its reset, written to `position` (batch,). */
msc_status msc_session_position(const msc_session* session, int64_t* position);

/* Consumes tokens (batch, count), row-major. `logits` becomes (batch, count, vocab), row-major, in memory of the
 * session, valid until its next call. */
msc_status msc_session_step(msc_session* session, const int64_t* tokens, int64_t count, const float** logits);

/* Begins new streams in these rows; with NULL, in all. */
msc_status msc_session_reset(msc_session* session, const int64_t* rows, size_t count);

/* A copy of all that the session knows, and the way back to it. */
msc_status msc_session_save(const msc_session* session, msc_snapshot** snapshot);
msc_status msc_session_restore(msc_session* session, const msc_snapshot* snapshot);
void msc_snapshot_close(msc_snapshot* snapshot);

/* Continues `prompt` on a session of one stream with up to `count` tokens: greedy at temperature 0, otherwise sampled
 * as in Python with the same seed. `each` gets every token and ends the text by returning something other than 0. */
msc_status msc_generate(msc_session* session, const int64_t* prompt, size_t prompt_count, int64_t count,
                        double temperature, uint64_t seed, int (*each)(int64_t token, void* user), void* user);

#ifdef __cplusplus
}
#endif

#endif
