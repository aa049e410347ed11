#include "tensorrt_sidecar.hpp"

#include <map>

#include "files.hpp"
#include "json.hpp"
#include "mscompile/error.hpp"

namespace mscompile {

namespace {

namespace fs = std::filesystem;

constexpr std::int64_t kLimit = std::int64_t{64} << 20U;
constexpr std::array<const char*, 3> kSteps = {"min", "opt", "max"};

void expect(const std::string& what, const Json& wanted, const Json& came) {
    if (wanted != came) throw Misfit(what + ": wanted " + wanted.dump() + ", found " + came.dump());
}

Ranges::Steps steps(const Place& place) {
    const auto items = place.items();
    if (items.size() != kSteps.size()) throw place.wanted("three sizes");
    return {items[0].integer(), items[1].integer(), items[2].integer()};
}

/// What an export promises: kernels for the smallest batch and the longest chunk.
Ranges promised(const StreamSpec& spec, const Ranges& found) {
    const auto multiple = spec.schedule.chunk_multiple;
    const auto longest = spec.schedule.max_chunk - spec.schedule.max_chunk % multiple;
    Ranges ranges;
    ranges.batch = {found.batch[0], found.batch[0], found.batch[2]};
    ranges.chunk = {multiple, longest, longest};
    ranges.context = {1, 1, 1};
    if (spec.max_context) {
        const auto most = *spec.max_context - *spec.max_context % multiple;
        ranges.context = {multiple, most, most};
    }
    return ranges;
}

Json words(const Ranges& ranges) {
    return {{"batch", ranges.batch}, {"chunk", ranges.chunk}, {"context", ranges.context}};
}

void check_ranges(const StreamSpec& spec, const Ranges& found) {
    expect("ranges", words(promised(spec, found)), words(found));
    if (found.batch[0] < 1 || found.batch[2] < spec.max_batch)
        throw Misfit("batches from " + std::to_string(found.batch[0]) + " to " + std::to_string(found.batch[2]) +
                     " where the model has 1 to " + std::to_string(spec.max_batch));
}

Json row(const TensorSpec& tensor) {
    Json shape = Json::array();
    for (const auto& dim : tensor.shape) std::visit([&shape](const auto& size) { shape.push_back(size); }, dim);
    return {{"name", tensor.name}, {"dtype", tensor.dtype}, {"shape", shape}};
}

Json profiled(const TensorSpec& tensor, const Ranges& ranges) {
    auto found = row(tensor);
    for (std::size_t i = 0; i < kSteps.size(); ++i)
        found["profile"][kSteps[i]] = tensor.concrete({ranges.batch[i], ranges.chunk[i], ranges.context[i]});
    return found;
}

/// What is said of a graph, as far as it is known before the build.
Json described(const GraphSpec& graph, const Ranges& ranges) {
    Json found = {{"file", graph.name + ".engine"}, {"inputs", Json::array()}, {"outputs", Json::array()}};
    for (const auto& tensor : graph.inputs) found["inputs"].push_back(profiled(tensor, ranges));
    for (const auto& tensor : graph.outputs) found["outputs"].push_back(row(tensor));
    return found;
}

void check_graph(const Place& place, const GraphSpec& graph, const Ranges& ranges, const fs::path& built) {
    place.check_keys("a graph", {"file", "inputs", "outputs", "size_bytes", "layers", "warnings"});
    const auto wanted = described(graph, ranges);
    for (const auto& [field, value] : wanted.items())
        expect(field + " of graph " + graph.name, value, place.json()[field]);
    const auto file = built / (graph.name + ".engine");
    if (!fs::is_regular_file(file)) throw Misfit(file.filename().string() + " is missing");
    expect("size of " + file.filename().string(), place["size_bytes"].integer(), fs::file_size(file));
}

Sidecar parsed(const Json& content, const fs::path& built, const std::string& runtime, const StreamSpec& spec) {
    const Place place(content, "engine.json");
    place.check_keys("engine.json", {"schema", "runtime", "version", "compute_capabilities", "ranges", "graphs"});
    expect("schema", 1, content["schema"]);
    expect("runtime", runtime, content["runtime"]);
    place["ranges"].check_keys("ranges", {"batch", "chunk", "context"});
    Sidecar found;
    found.version = place["version"].text();
    for (const auto& name : place["compute_capabilities"].items()) found.compute_capabilities.push_back(name.text());
    const auto ranges = place["ranges"];
    found.ranges = {steps(ranges["batch"]), steps(ranges["chunk"]), steps(ranges["context"])};
    check_ranges(spec, found.ranges);
    std::vector<std::string> names;
    for (const auto& graph : spec.graphs) names.push_back(graph.name);
    place["graphs"].check_keys("graphs", names);
    for (const auto& graph : spec.graphs) check_graph(place["graphs"][graph.name], graph, found.ranges, built);
    return found;
}

}  // namespace

Sidecar read_sidecar(const fs::path& built, const std::string& runtime, const StreamSpec& spec) {
    const auto path = built / "engine.json";
    try {
        return parsed(parse_json(read_file(path, kLimit)), built, runtime, spec);
    } catch (const Misfit& misfit) {
        throw Error(Fault::engine,
                    path.string() + " is damaged or of another version: " + misfit.what() + "; export again");
    }
}

}  // namespace mscompile
