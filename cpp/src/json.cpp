#include "json.hpp"

#include <algorithm>
#include <limits>
#include <set>

#include "text.hpp"

namespace mscompile {

namespace {

constexpr std::size_t kTextShown = 30;
constexpr std::size_t kItemsShown = 6;
constexpr std::size_t kEntriesShown = 4;
constexpr int kLevelsShown = 6;
constexpr int kDepthLimit = 64;  // of objects and lists in one another; a manifest has about ten levels

std::string shown(const Json& value, int levels);

std::string type_name(const Json& value) {
    switch (value.type()) {
        case Json::value_t::object:
            return "dict";
        case Json::value_t::array:
            return "list";
        case Json::value_t::string:
            return "str";
        case Json::value_t::boolean:
            return "bool";
        case Json::value_t::number_float:
            return "float";
        case Json::value_t::null:
            return "NoneType";
        default:
            return "int";
    }
}

std::string shortened(const std::string& text) {
    const auto letters = characters(in_quotes(text));
    if (letters.size() <= kTextShown) return join(letters, "");
    const auto head = (kTextShown - 3) / 2;
    const auto tail = static_cast<std::ptrdiff_t>(kTextShown - 3 - head);
    return join({letters.begin(), letters.begin() + static_cast<std::ptrdiff_t>(head)}, "") + "..." +
           join({letters.end() - tail, letters.end()}, "");
}

std::string shown_list(const Json& value, int levels) {
    std::vector<std::string> items;
    for (const auto& item : value) {
        if (items.size() == kItemsShown) {
            items.emplace_back("...");
            break;
        }
        items.push_back(shown(item, levels - 1));
    }
    return "[" + join(items) + "]";
}

std::string shown_object(const Json& value, int levels) {
    std::vector<std::string> items;
    for (const auto& [key, item] : value.items()) {
        if (items.size() == kEntriesShown) {
            items.emplace_back("...");
            break;
        }
        items.push_back(shortened(key) + ": " + shown(item, levels - 1));
    }
    return "{" + join(items) + "}";
}

/// As Python's reprlib shows the value.
std::string shown(const Json& value, int levels) {
    if (value.is_array() && !value.empty()) return levels <= 0 ? "[...]" : shown_list(value, levels);
    if (value.is_object() && !value.empty()) return levels <= 0 ? "{...}" : shown_object(value, levels);
    if (value.is_string()) return shortened(value.get_ref<const std::string&>());
    if (value.is_boolean()) return value.get<bool>() ? "True" : "False";
    if (value.is_null()) return "None";
    if (value.is_number_float()) return mscompile::shown(value.get<double>());
    return value.dump();
}

bool is_too_large(const Json& value) {
    constexpr auto kLargest = static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max());
    return value.is_number_unsigned() && value.get<std::uint64_t>() > kLargest;
}

/// Refuses repeated keys, and numbers and depths that nothing in a bundle has.
class Guard {
  public:
    bool operator()(int depth, Json::parse_event_t event, Json& parsed) {
        if (depth >= kDepthLimit)
            throw Misfit("it has values " + std::to_string(kDepthLimit) + " levels deep and more");
        if (event == Json::parse_event_t::value && is_too_large(parsed))
            throw Misfit("it has a whole number of more than 64 bits");
        if (event == Json::parse_event_t::object_start) keys_.emplace_back();
        if (event == Json::parse_event_t::object_end) keys_.pop_back();
        if (event == Json::parse_event_t::key && !keys_.back().insert(parsed.get<std::string>()).second)
            throw Misfit("key " + in_quotes(parsed.get<std::string>()) + " occurs twice in one object");
        return true;
    }

  private:
    std::vector<std::set<std::string>> keys_;
};

}  // namespace

Json parse_json(std::string_view text) {
    try {
        Guard guard;
        return Json::parse(
            text, [&guard](int depth, Json::parse_event_t event, Json& parsed) { return guard(depth, event, parsed); });
    } catch (const Json::exception& error) {
        throw Misfit(error.what());
    }
}

std::string Place::text() const {
    if (!value_->is_string()) throw wanted("str");
    return value_->get<std::string>();
}

std::int64_t Place::integer() const {
    if (!value_->is_number_integer()) throw wanted("int");
    return value_->get<std::int64_t>();
}

bool Place::boolean() const {
    if (!value_->is_boolean()) throw wanted("bool");
    return value_->get<bool>();
}

double Place::number() const {
    if (value_->is_number_float()) return value_->get<double>();
    if (*value_ == "NaN") return std::numeric_limits<double>::quiet_NaN();
    if (*value_ == "Infinity") return std::numeric_limits<double>::infinity();
    if (*value_ == "-Infinity") return -std::numeric_limits<double>::infinity();
    throw wanted("float");
}

std::vector<Place> Place::items() const {
    if (!value_->is_array()) throw wanted("list");
    std::vector<Place> found;
    for (const auto& item : *value_) found.emplace_back(item, where_ + "[" + std::to_string(found.size()) + "]");
    return found;
}

std::vector<std::pair<std::string, Place>> Place::entries() const {
    if (!value_->is_object()) throw wanted("object");
    std::vector<std::pair<std::string, Place>> found;
    for (const auto& [key, item] : value_->items())
        found.emplace_back(key, Place(item, where_ + "[" + in_quotes(key) + "]"));
    return found;
}

void Place::check_keys(const std::string& type, const std::vector<std::string>& required,
                       const std::vector<std::string>& optional) const {
    if (!value_->is_object()) throw wanted("object");
    auto known = required;
    known.insert(known.end(), optional.begin(), optional.end());
    for (const auto& [key, item] : value_->items())
        if (std::find(known.begin(), known.end(), key) == known.end())
            throw Misfit(where_ + ": unknown key " + in_quotes(key) + ", " + type + " has " + join(known));
    for (const auto& key : required)
        if (!has(key)) throw Misfit(where_ + ": missing key " + in_quotes(key));
}

Place Place::operator[](const std::string& key) const { return {(*value_)[key], where_ + "." + key}; }

Misfit Place::wanted(const std::string& what) const {
    Misfit misfit(where_ + ": wanted " + what + ", got " + type_name(*value_) + " " + shown(*value_, kLevelsShown));
    return misfit;
}

}  // namespace mscompile
