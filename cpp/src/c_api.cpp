// The C interface: no exception leaves it.
#include <algorithm>
#include <exception>
#include <new>
#include <string>

#include "mscompile/mscompile.h"
#include "mscompile/mscompile.hpp"
#include "text.hpp"

struct msc_bundle {
    mscompile::Bundle bundle;
};

struct msc_session {
    mscompile::Session session;
};

struct msc_snapshot {
    mscompile::Snapshot snapshot;
};

namespace {

using mscompile::Error;
using mscompile::Fault;

std::string& last_error() {
    thread_local std::string sentence;
    return sentence;
}

msc_status failed(msc_status status, const char* sentence) {
    last_error() = sentence;
    return status;
}

/// Runs `body` and turns what it throws into a status.
template <class Body>
msc_status guarded(Body body) {
    try {
        body();
        return MSC_OK;
    } catch (const Error& error) {
        return failed(static_cast<msc_status>(error.exit_code()), error.what());
    } catch (const std::bad_alloc&) {
        return failed(MSC_ENGINE, "there is not enough memory");
    } catch (const std::exception& error) {
        return failed(MSC_ENGINE, error.what());
    }
}

void require(bool holds, const std::string& sentence) {
    if (!holds) throw Error(Fault::usage, sentence);
}

template <class... Pointers>
void require_given(const char* function, Pointers... pointers) {
    require(((pointers != nullptr) && ...), std::string(function) + " was given NULL for what it needs");
}

/// Copies to the caller's memory, and says how much there is.
template <class Items, class Item>
void hand_over(const Items& items, Item* target, std::size_t capacity, std::size_t* count) {
    *count = items.size();
    if (target == nullptr && capacity == 0) return;
    require(target != nullptr && capacity >= items.size(),
            "room for " + std::to_string(items.size()) + " is needed, and " + std::to_string(capacity) + " was given");
    std::copy(items.begin(), items.end(), target);
}

std::string text_or_empty(const char* text) { return text == nullptr ? std::string() : std::string(text); }

mscompile::Source source_of(const msc_named_source& named) {
    return [named](const std::int64_t* chunks, std::int64_t count, void* entries) {
        if (named.source(chunks, count, entries, named.user) != 0)
            throw Error(Fault::input, "the source of " + std::string(named.name) + " failed");
    };
}

mscompile::SessionOptions options_of(const msc_options& given) {
    mscompile::SessionOptions options;
    options.engine = text_or_empty(given.engine);
    options.library = text_or_empty(given.library);
    options.batch = given.batch;
    options.threads = given.threads;
    for (std::size_t i = 0; i < given.source_count; ++i) {
        require_given("msc_session_open", given.sources, given.sources[i].name, given.sources[i].source);
        options.sources[given.sources[i].name] = source_of(given.sources[i]);
    }
    return options;
}

}  // namespace

extern "C" {

const char* msc_last_error(void) { return last_error().c_str(); }

msc_status msc_bundle_open(const char* path, int hash_files, msc_bundle** bundle) {
    return guarded([&] {
        require_given("msc_bundle_open", path, bundle);
        *bundle = new msc_bundle{mscompile::Bundle::open(path, hash_files != 0)};
    });
}

void msc_bundle_close(msc_bundle* bundle) { delete bundle; }

msc_status msc_encode(const msc_bundle* bundle, const char* text, int64_t* ids, size_t capacity, size_t* count) {
    return guarded([&] {
        require_given("msc_encode", bundle, text, count);
        hand_over(bundle->bundle.tokenizer().encode(text), ids, capacity, count);
    });
}

msc_status msc_decode(const msc_bundle* bundle, const int64_t* ids, size_t count, char* text, size_t capacity,
                      size_t* length) {
    return guarded([&] {
        require_given("msc_decode", bundle, ids, length);
        auto found = bundle->bundle.tokenizer().decode({ids, ids + count});
        found.push_back('\0');
        hand_over(found, text, capacity, length);
    });
}

msc_status msc_session_open(msc_bundle* bundle, const msc_options* options, msc_session** session) {
    return guarded([&] {
        require_given("msc_session_open", bundle, options, session);
        *session = new msc_session{bundle->bundle.session(options_of(*options))};
    });
}

void msc_session_close(msc_session* session) { delete session; }

int64_t msc_session_batch(const msc_session* session) { return session == nullptr ? 0 : session->session.batch(); }

int64_t msc_session_vocab_size(const msc_session* session) {
    return session == nullptr ? 0 : session->session.vocab_size();
}

msc_status msc_session_position(const msc_session* session, int64_t* position) {
    return guarded([&] {
        require_given("msc_session_position", session, position);
        const auto found = session->session.position();
        std::copy(found.begin(), found.end(), position);
    });
}

msc_status msc_session_step(msc_session* session, const int64_t* tokens, int64_t count, const float** logits) {
    return guarded([&] {
        require_given("msc_session_step", session, tokens, logits);
        *logits = session->session.step(tokens, count).data;
    });
}

msc_status msc_session_reset(msc_session* session, const int64_t* rows, size_t count) {
    return guarded([&] {
        require_given("msc_session_reset", session);
        if (rows == nullptr) session->session.reset();
        if (rows != nullptr) session->session.reset({rows, rows + count});
    });
}

msc_status msc_session_save(const msc_session* session, msc_snapshot** snapshot) {
    return guarded([&] {
        require_given("msc_session_save", session, snapshot);
        *snapshot = new msc_snapshot{session->session.snapshot()};
    });
}

msc_status msc_session_restore(msc_session* session, const msc_snapshot* snapshot) {
    return guarded([&] {
        require_given("msc_session_restore", session, snapshot);
        session->session.restore(snapshot->snapshot);
    });
}

void msc_snapshot_close(msc_snapshot* snapshot) { delete snapshot; }

msc_status msc_generate(msc_session* session, const int64_t* prompt, size_t prompt_count, int64_t count,
                        double temperature, uint64_t seed, int (*each)(int64_t token, void* user), void* user) {
    return guarded([&] {
        require_given("msc_generate", session, prompt, each);
        mscompile::generate(session->session, {prompt, prompt + prompt_count}, count, {temperature, seed},
                            [&](std::int64_t token) { return each(token, user) == 0; });
    });
}

}  // extern "C"
