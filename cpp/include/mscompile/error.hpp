// The one exception type of this library.
#pragma once

#include <stdexcept>
#include <string>

namespace mscompile {

/// What kind of thing went wrong.
enum class Fault {
    usage,        ///< an option or argument that cannot work
    bundle,       ///< a bundle that is damaged, tampered with or from a newer version
    input,        ///< tokens or shapes outside what an engine was built for
    engine,       ///< an engine failed
    unavailable,  ///< that engine cannot run on this machine; the text says what is missing
};

/// Every error this library throws on purpose. `what()` says what was wanted, what came and what to do, in one
/// sentence.
class Error : public std::runtime_error {
  public:
    Error(Fault fault, const std::string& sentence) : std::runtime_error(sentence), fault_(fault) {}

    [[nodiscard]] Fault fault() const noexcept { return fault_; }

    /// How a command that ends with this error exits: 3 where an engine failed or is missing, otherwise 2.
    [[nodiscard]] int exit_code() const noexcept {
        return fault_ == Fault::engine || fault_ == Fault::unavailable ? 3 : 2;
    }

  private:
    Fault fault_;
};

}  // namespace mscompile
