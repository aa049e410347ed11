// JSON values by the fields that they must have, strictly, with the place of anything that does not fit.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace mscompile {

using Json = nlohmann::json;

/// A JSON value that is not what was wanted; the caller says of which file.
class Misfit : public std::runtime_error {
  public:
    using std::runtime_error::runtime_error;
};

/// Parses UTF-8 JSON without repeated keys. Throws Misfit.
Json parse_json(std::string_view text);

/// A value and where it stands, such as `manifest.spec.states[3]`.
class Place {
  public:
    Place(const Json& value, std::string where) : value_(&value), where_(std::move(where)) {}

    [[nodiscard]] bool is_null() const { return value_->is_null(); }
    [[nodiscard]] bool is_list() const { return value_->is_array(); }
    [[nodiscard]] const Json& json() const { return *value_; }

    [[nodiscard]] std::string text() const;
    [[nodiscard]] std::int64_t integer() const;
    [[nodiscard]] bool boolean() const;
    [[nodiscard]] double number() const;  ///< a float, or the word of one that is not finite
    [[nodiscard]] std::vector<Place> items() const;
    [[nodiscard]] std::vector<std::pair<std::string, Place>> entries() const;  ///< of an object, sorted by key

    /// Throws Misfit unless this is an object with all of `required`, and perhaps `optional`, keys.
    void check_keys(const std::string& type, const std::vector<std::string>& required,
                    const std::vector<std::string>& optional = {}) const;

    /// A field of an object, after `check_keys`.
    [[nodiscard]] Place operator[](const std::string& key) const;
    [[nodiscard]] bool has(const std::string& key) const { return value_->contains(key); }

    /// "where: wanted .., got ..".
    [[nodiscard]] Misfit wanted(const std::string& what) const;

  private:
    const Json* value_;
    std::string where_;
};

}  // namespace mscompile
