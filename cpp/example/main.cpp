// Continues a text: generate BUNDLE [PROMPT] [TOKENS] [TEMPERATURE] [SEED]
#include <cstdlib>
#include <iostream>
#include <mscompile/mscompile.hpp>
#include <string>

namespace {

int run(int argc, char** argv) {
    const std::string prompt = argc > 2 ? argv[2] : "\n";
    const std::int64_t count = argc > 3 ? std::atoll(argv[3]) : 200;
    mscompile::Sampling sampling;
    if (argc > 4) sampling.temperature = std::atof(argv[4]);
    if (argc > 5) sampling.seed = std::strtoull(argv[5], nullptr, 10);

    auto bundle = mscompile::Bundle::open(argv[1]);  // every file is held against its hash
    const auto tokenizer = bundle.tokenizer();
    auto session = bundle.session();  // the first engine that runs here, one stream

    std::cout << prompt;
    mscompile::generate(session, tokenizer.encode(prompt), count, sampling, [&](std::int64_t token) {
        std::cout << tokenizer.decode({token}) << std::flush;
        return true;
    });
    std::cout << "\n";
    return 0;
}

}  // namespace

int main(int argc, char** argv) {
    if (argc < 2) {
        std::cerr << "usage: generate BUNDLE [PROMPT] [TOKENS] [TEMPERATURE] [SEED]\n";
        return 2;
    }
    try {
        return run(argc, argv);
    } catch (const mscompile::Error& error) {
        std::cerr << "error: " << error.what() << "\n";
        return error.exit_code();
    }
}
