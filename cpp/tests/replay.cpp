// Does what a script on stdin says, so that another host can do the same and compare:
//
//   replay BUNDLE BATCH < SCRIPT > LOGITS
//
//   step T i i i ..      consume tokens (batch, T); the logits go to stdout, float32
//   reset | reset ROWS   begin new streams
//   save | restore       a snapshot, and back
//   refused T i i i ..   a step that must fail; its sentence goes to stdout as a line
//   position             a line on stdout
//
// A source that counts the tokens of a chunk stands for every host input.
#include <cstring>
#include <iostream>
#include <sstream>

#include "mscompile/mscompile.hpp"

namespace {

std::vector<std::int64_t> numbers(std::istringstream& words) {
    std::vector<std::int64_t> found;
    for (std::int64_t number = 0; words >> number;) found.push_back(number);
    return found;
}

void write(const mscompile::Logits& logits) {
    const auto size = static_cast<std::size_t>(logits.batch * logits.tokens * logits.vocab) * sizeof(float);
    std::cout.write(reinterpret_cast<const char*>(logits.data), static_cast<std::streamsize>(size));
}

/// Entries of whole numbers: the sum of the chunk's tokens plus the place in the entry, within bounds.
mscompile::Source source_of(const mscompile::HostInput& given) {
    std::int64_t size = 1;
    for (const auto dim : given.shape) size *= dim;
    return [given, size](const std::int64_t* chunks, std::int64_t count, void* entries) {
        for (std::int64_t i = 0; i < count; ++i) {
            std::int64_t sum = 0;
            for (std::int64_t j = 0; j < given.every; ++j) sum += chunks[i * given.every + j];
            for (std::int64_t j = 0; j < size; ++j)
                static_cast<std::int64_t*>(entries)[i * size + j] = (sum + j) % given.below.value_or(1);
        }
    };
}

void follow(mscompile::Session& session, mscompile::Snapshot& saved, const std::string& line) {
    std::istringstream words(line);
    std::string verb;
    std::int64_t count = 0;
    words >> verb;
    if (verb == "step" || verb == "refused") words >> count;
    const auto given = numbers(words);
    if (verb == "step") write(session.step(given.data(), count));
    if (verb == "reset" && given.empty()) session.reset();
    if (verb == "reset" && !given.empty()) session.reset(given);
    if (verb == "save") saved = session.snapshot();
    if (verb == "restore") session.restore(saved);
    if (verb == "position") {
        for (const auto position : session.position()) std::cout << position << " ";
        std::cout << "\n";
    }
    if (verb == "refused") {
        try {
            session.step(given.data(), count);
            throw std::logic_error("a step that had to be refused was taken");
        } catch (const mscompile::Error& error) {
            std::cout << error.what() << "\n";
        }
    }
}

}  // namespace

int main(int argc, char** argv) {
    if (argc != 3) return 2;
    try {
        auto bundle = mscompile::Bundle::open(argv[1]);
        mscompile::SessionOptions options;
        options.batch = std::stoll(argv[2]);
        options.threads = 1;
        for (const auto& given : bundle.spec().inputs) options.sources[given.name] = source_of(given);
        auto session = bundle.session(options);
        mscompile::Snapshot saved;
        for (std::string line; std::getline(std::cin, line);) follow(session, saved, line);
        return 0;
    } catch (const mscompile::Error& error) {
        std::cerr << "error: " << error.what() << "\n";
        return error.exit_code();
    } catch (const std::exception& error) {
        std::cerr << "failed: " << error.what() << "\n";
        return 1;
    }
}
