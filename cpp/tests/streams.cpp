// Several threads, each with a session of its own on one engine: streams BUNDLE THREADS. Every thread has to get the
// greedy text that the first one gets.
#include <iostream>
#include <thread>

#include "mscompile/mscompile.hpp"

int main(int argc, char** argv) {
    if (argc != 3) return 2;
    try {
        auto bundle = mscompile::Bundle::open(argv[1]);
        mscompile::SessionOptions options;
        options.threads = 1;
        std::vector<mscompile::Session> sessions;
        for (int i = 0; i < std::stoi(argv[2]); ++i) sessions.push_back(bundle.session(options));
        std::vector<std::vector<std::int64_t>> texts(sessions.size());
        std::vector<std::thread> threads;
        for (std::size_t i = 0; i < sessions.size(); ++i)
            threads.emplace_back([&, i] { texts[i] = mscompile::generate(sessions[i], {1, 2, 3, 4, 5}, 40); });
        for (auto& thread : threads) thread.join();
        for (const auto& text : texts)
            if (text.size() != 40 || text != texts.front()) return 1;
        return 0;
    } catch (const mscompile::Error& error) {
        std::cerr << "error: " << error.what() << "\n";
        return error.exit_code();
    }
}
