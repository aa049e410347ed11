// The manifest of a bundle: strict JSON to values, then what must hold between them.
#include <algorithm>

#include "json.hpp"
#include "mscompile/bundle.hpp"
#include "spec_fault.hpp"
#include "text.hpp"

namespace mscompile {

namespace {

constexpr std::int64_t kSchema = 1;
constexpr const char* kManifest = "manifest.json";
constexpr const char* kAgain = "; export or copy it again";

template <class Read>
auto list(const Place& place, Read read) {
    std::vector<decltype(read(place))> found;
    for (const auto& item : place.items()) found.push_back(read(item));
    return found;
}

std::string text(const Place& place) { return place.text(); }
std::int64_t integer(const Place& place) { return place.integer(); }

std::optional<std::int64_t> optional_integer(const Place& place) {
    return place.is_null() ? std::nullopt : std::optional(place.integer());
}

Dim dim(const Place& place) {
    if (place.json().is_string()) return place.text();
    if (!place.json().is_number_integer()) throw place.wanted("int or str");
    return place.integer();
}

TensorSpec tensor(const Place& place) {
    place.check_keys("TensorSpec", {"name", "dtype", "shape"});
    return {place["name"].text(), place["dtype"].text(), list(place["shape"], dim)};
}

Update update(const Place& place) {
    if (place.json() == "replace") return Update::replace;
    if (place.json() == "append") return Update::append;
    throw place.wanted("'replace' or 'append'");
}

std::vector<double> initial(const Place& place) {
    try {
        if (place.is_list()) return list(place, [](const Place& item) { return item.number(); });
        return {place.number()};
    } catch (const Misfit&) {
        throw place.wanted("float or list");
    }
}

StateSpec state(const Place& place) {
    place.check_keys("StateSpec", {"name", "dtype", "shape"},
                     {"update", "time_axis", "batch_axis", "initial", "reads_initial"});
    StateSpec found;
    found.name = place["name"].text();
    found.dtype = place["dtype"].text();
    found.shape = list(place["shape"], dim);
    if (place.has("update")) found.update = update(place["update"]);
    if (place.has("time_axis")) found.time_axis = optional_integer(place["time_axis"]);
    if (place.has("batch_axis")) found.batch_axis = place["batch_axis"].integer();
    if (place.has("initial")) {
        found.initial = initial(place["initial"]);
        found.initial_is_row = place["initial"].is_list();
    }
    if (place.has("reads_initial")) found.reads_initial = place["reads_initial"].boolean();
    return found;
}

GraphSpec graph(const Place& place) {
    place.check_keys("GraphSpec", {"name", "inputs", "outputs", "reads", "writes", "tokens"});
    return {place["name"].text(),       list(place["inputs"], tensor), list(place["outputs"], tensor),
            list(place["reads"], text), list(place["writes"], text),   dim(place["tokens"])};
}

Tick tick(const Place& place) {
    place.check_keys("Tick", {"graphs"}, {"closing", "repeat"});
    Tick found{list(place["graphs"], text), {}, 1};
    if (place.has("closing")) found.closing = list(place["closing"], text);
    if (place.has("repeat")) found.repeat = place["repeat"].integer();
    return found;
}

Schedule schedule(const Place& place) {
    place.check_keys("Schedule", {"ticks"}, {"prefill", "chunk_multiple", "max_chunk"});
    Schedule found;
    found.ticks = list(place["ticks"], tick);
    if (place.has("prefill") && !place["prefill"].is_null()) found.prefill = place["prefill"].text();
    if (place.has("chunk_multiple")) found.chunk_multiple = place["chunk_multiple"].integer();
    if (place.has("max_chunk")) found.max_chunk = place["max_chunk"].integer();
    return found;
}

HostInput host_input(const Place& place) {
    place.check_keys("HostInput", {"name", "dtype", "shape", "every"}, {"below"});
    HostInput found{place["name"].text(), place["dtype"].text(), list(place["shape"], integer),
                    place["every"].integer(), std::nullopt};
    if (place.has("below")) found.below = optional_integer(place["below"]);
    return found;
}

StreamSpec stream_spec(const Place& place) {
    place.check_keys("StreamSpec", {"states", "graphs", "schedule", "vocab_size", "max_batch"},
                     {"max_context", "inputs"});
    StreamSpec found;
    found.states = list(place["states"], state);
    found.graphs = list(place["graphs"], graph);
    found.schedule = schedule(place["schedule"]);
    found.vocab_size = place["vocab_size"].integer();
    found.max_batch = place["max_batch"].integer();
    if (place.has("max_context")) found.max_context = optional_integer(place["max_context"]);
    if (place.has("inputs")) found.inputs = list(place["inputs"], host_input);
    return found;
}

FileEntry file_entry(const Place& place) {
    place.check_keys("FileEntry", {"sha256", "size_bytes"});
    return {place["sha256"].text(), place["size_bytes"].integer()};
}

void check_hit(const Place& place) {
    place.check_keys("Hit", {"name", "place", "applied", "reason"});
    for (const auto* key : {"name", "place", "reason"}) static_cast<void>(place[key].text());
    static_cast<void>(place["applied"].boolean());
}

/// What a host does not use must have its form all the same.
void check_records(const Place& place) {
    for (const auto* key : {"source", "tolerances", "costs", "versions"}) static_cast<void>(place[key].entries());
    for (const auto& [name, version] : place["versions"].entries()) static_cast<void>(version.text());
    for (const auto& [name, cost] : place["costs"].entries()) static_cast<void>(cost.integer());
    for (const auto& [name, limit] : place["tolerances"].entries()) static_cast<void>(limit.number());
    for (const auto& [name, facts] : place["engines"].entries()) static_cast<void>(facts.entries());
    if (!place["parity"].is_null()) static_cast<void>(place["parity"].entries());
    const auto profile = place["profile"];
    profile.check_keys("Profile", {}, {"min_batch", "max_batch", "max_chunk"});
    for (const auto& [name, size] : profile.entries()) static_cast<void>(size.integer());
    for (const auto* key : {"rules", "passes"})
        for (const auto& hit : place[key].items()) check_hit(hit);
}

Manifest manifest(const Place& place) {
    place.check_keys("Manifest",
                     {"schema", "name", "title", "family", "precision", "verified", "source", "versions", "profile",
                      "engines", "costs", "tolerances", "parity", "rules", "passes", "spec"},
                     {"files"});
    check_records(place);
    Manifest found;
    found.name = place["name"].text();
    found.title = place["title"].text();
    found.family = place["family"].text();
    found.precision = place["precision"].text();
    found.verified = place["verified"].boolean();
    for (const auto& [name, facts] : place["engines"].entries()) found.engines.push_back(name);
    found.spec = stream_spec(place["spec"]);
    if (place.has("files"))
        for (const auto& [name, entry] : place["files"].entries()) found.files.emplace(name, file_entry(entry));
    return found;
}

std::optional<std::string> path_fault(const std::string& name) {
    if (name == kManifest) return "which cannot hold its own hash";
    const auto first = name.substr(0, name.find('/'));
    if (name.empty() || name.front() == '/' || name.find('\\') != std::string::npos ||
        first.find(':') != std::string::npos)
        return name.empty() ? "which has an empty, '.' or '..' part"
                            : "which is not a relative path with forward slashes";
    for (std::size_t start = 0; start <= name.size();) {
        const auto end = std::min(name.find('/', start), name.size());
        const auto part = name.substr(start, end - start);
        if (part.empty() || part == "." || part == "..") return "which has an empty, '.' or '..' part";
        start = end + 1;
    }
    return std::nullopt;
}

/// For each graph an object, with the number of `products` by type among its facts.
bool are_numerics(const Json& value) {
    return value.is_object() && std::all_of(value.begin(), value.end(), [](const Json& row) {
               return row.is_object() && row.contains("products") && row["products"].is_object();
           });
}

std::optional<std::string> numerics_fault(const Json& engines) {
    for (const auto& [name, facts] : engines.items())
        if (facts.contains("numerics") && !are_numerics(facts["numerics"]))
            return "engine " + in_quotes(name) + " has numerics that are no products by graph";
    return std::nullopt;
}

/// How many nodes the graphs had after a stage of the export.
void check_stage(const Place& place) {
    place.check_keys("Stage", {"after", "graphs"});
    static_cast<void>(place["after"].text());
    for (const auto& [name, nodes] : place["graphs"].entries()) static_cast<void>(nodes.integer());
}

/// What is read of the facts about the checkpoint, which are free otherwise.
std::optional<std::string> source_fault(const Place& place) {
    try {
        if (!place.has("sha256")) return "source: missing key 'sha256'";
        static_cast<void>(place["sha256"].text());
        if (place.has("parameters")) static_cast<void>(optional_integer(place["parameters"]));
        if (place.has("nodes"))
            for (const auto& stage : place["nodes"].items()) check_stage(stage);
    } catch (const Misfit& error) {
        return error.what();
    }
    return std::nullopt;
}

/// Names that differ only in the case of letters of ASCII; other letters are left to the systems that mix them up.
std::optional<std::string> same_file_fault(const std::map<std::string, FileEntry>& files) {
    std::map<std::string, std::string> known;
    for (const auto& [name, entry] : files) {
        auto key = name;
        std::transform(key.begin(), key.end(), key.begin(),
                       [](char letter) { return 'A' <= letter && letter <= 'Z' ? char(letter - 'A' + 'a') : letter; });
        const auto [other, is_new] = known.emplace(key, name);
        if (!is_new)
            return "files " + in_quotes(other->second) + " and " + in_quotes(name) +
                   " are one file on systems that do not tell their names apart";
    }
    return std::nullopt;
}

std::optional<std::string> manifest_fault(const Manifest& manifest, const Json& data) {
    if (auto fault = name_fault("bundle", manifest.name)) return fault;
    if (auto fault = numerics_fault(data["engines"])) return fault;
    for (const auto& engine : manifest.engines)
        if (auto fault = name_fault("engine", engine)) return fault;
    if (auto fault = source_fault({data["source"], "source"})) return fault;
    if (manifest.verified && data["parity"].is_null()) return "it says that it was verified and has no parity report";
    for (const auto& [name, entry] : manifest.files)
        if (auto fault = path_fault(name)) return "file " + in_quotes(name) + " is listed, " + *fault;
    if (auto fault = same_file_fault(manifest.files)) return fault;
    if (auto fault = spec_fault(manifest.spec)) return fault;
    for (const auto& graph : manifest.spec.graphs) {
        const auto file = "graphs/" + graph.name + ".onnx";
        if (manifest.files.count(file) == 0) return "file " + in_quotes(file) + " of a graph is not listed";
    }
    return std::nullopt;
}

void check_schema(const Json& data, const std::string& bundle, const std::string& path) {
    const bool named = data.is_object() && data.contains("schema") && data["schema"].is_number_integer();
    if (!named || data["schema"] < 1)
        throw Error(Fault::bundle, path + " is not the manifest of a bundle: it has no schema number" + kAgain);
    if (data["schema"] > kSchema)
        throw Error(Fault::bundle, bundle + ": this bundle has schema " + data["schema"].dump() +
                                       ", this mscompile reads up to " + std::to_string(kSchema) +
                                       "; upgrade mscompile");
}

}  // namespace

Manifest parse_manifest(std::string_view text, const std::string& bundle) {
    const auto path = bundle + "/" + kManifest;
    const char* wrong = " is not valid JSON: ";
    try {
        const auto data = parse_json(text);
        check_schema(data, bundle, path);
        wrong = " does not follow schema 1: ";
        auto found = manifest(Place(data, "manifest"));
        if (auto fault = manifest_fault(found, data))
            throw Error(Fault::bundle, path + " contradicts itself: " + *fault + kAgain);
        return found;
    } catch (const Misfit& misfit) {
        throw Error(Fault::bundle, path + wrong + misfit.what() + kAgain);
    }
}

}  // namespace mscompile
