/* Continues a text with the most probable tokens: generate-c BUNDLE PROMPT TOKENS */
#include <mscompile/mscompile.h>
#include <stdio.h>
#include <stdlib.h>

static int show(int64_t token, void* user) {
    char text[16];
    size_t length = 0;
    if (msc_decode(user, &token, 1, text, sizeof text, &length) != MSC_OK) return 1;
    fputs(text, stdout);
    return 0;
}

static msc_status generate(msc_bundle* bundle, const char* prompt, int64_t count) {
    msc_options options = {0};
    msc_session* session = NULL;
    int64_t ids[1024];
    size_t length = 0;
    options.batch = 1;
    msc_status status = msc_encode(bundle, prompt, ids, sizeof ids / sizeof *ids, &length);
    if (status == MSC_OK) status = msc_session_open(bundle, &options, &session);
    if (status == MSC_OK) fputs(prompt, stdout);
    if (status == MSC_OK) status = msc_generate(session, ids, length, count, 0.0, 0, show, bundle);
    if (status == MSC_OK) putchar('\n');
    msc_session_close(session);
    return status;
}

int main(int argc, char** argv) {
    if (argc != 4) return 2;
    msc_bundle* bundle = NULL;
    msc_status status = msc_bundle_open(argv[1], 1, &bundle);
    if (status == MSC_OK) status = generate(bundle, argv[2], atoll(argv[3]));
    if (status != MSC_OK) fprintf(stderr, "error: %s\n", msc_last_error());
    msc_bundle_close(bundle);
    return status;
}
