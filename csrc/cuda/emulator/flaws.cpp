#include "flaws.h"

#include <algorithm>
#include <cstring>
#include <iterator>
#include <string_view>

namespace fusedattn::emulator {

bool flaws_matter = false;

namespace {

bool same(const char* a, const char* b) { return a == b || std::strcmp(a, b) == 0; }

bool is_bound(Flaw flaw) { return flaw == Flaw::bound_too_high || flaw == Flaw::bound_too_low; }

// For whom a function that takes another one works: the last name of its scope, from "… [with …
// Function = fusedattn::cuda::scope<…>::<lambda…".
std::string_view scope(const Where& where) {
  std::string_view name = where.function_name();
  const size_t begin = name.find("Function = ");
  if (begin == name.npos) return "";
  name = name.substr(begin, name.find_first_of("<(", begin) - begin);
  return name.substr(name.find_last_of(" :") + 1);
}

// Bounds are those of the source: in all instantiations at once, for not in each of them a thread
// comes to the bound.
struct Place {
  const char* kernel;
  Flaw flaw;
  Where where;
  const void* instance;  // the return address, where that tells places apart

  bool operator==(const Place& other) const {
    return flaw == other.flaw && where.line() == other.where.line() && instance == other.instance &&
           same(kernel, other.kernel) && same(where.file_name(), other.where.file_name()) &&
           (same(where.function_name(), other.where.function_name()) ||
            (is_bound(flaw) && scope(where) == scope(other.where)));
  }
};

std::vector<Place> seen;
bool watching = false;
int planted = -1;
const char* running = "";

const char* const names[] = {"no barrier", "no wait",       "wait for one less", "no commit",
                             "no zeros",   "copies anyway", "wrong swizzle",     "next place",
                             "no shuffle", "own block",     "bound too high",    "bound too low",
                             "no atomic",  "late begin",    "early end",         "early full",
                             "late full"};

bool counts_instances(Flaw flaw) {
  return flaw == Flaw::no_zeros || flaw == Flaw::copies_anyway || flaw == Flaw::wrong_swizzle ||
         flaw == Flaw::next_place;
}

}  // namespace

void watch() {
  seen.clear();
  planted = -1;
  flaws_matter = watching = true;
}

std::vector<std::string> flaws() {
  watching = flaws_matter = false;
  std::vector<std::string> texts;
  for (const Place& each : seen) {
    const char* slash = std::strrchr(each.where.file_name(), '/');
    const auto before = std::count_if<const Place*>(seen.data(), &each, [&](const Place& other) {
      Place twin = other;
      twin.instance = each.instance;
      return twin == each;
    });
    std::string text = std::string(each.kernel) + ": " + names[int(each.flaw)] + ", " +
                       (slash ? slash + 1 : each.where.file_name()) + ":" +
                       std::to_string(each.where.line());
    if (is_bound(each.flaw) && !scope(each.where).empty())
      text += " for " + std::string(scope(each.where));
    texts.push_back(before ? text + " (" + std::to_string(before + 1) + ")" : text);
  }
  return texts;
}

void plant(int flaw) {
  planted = flaw < int(seen.size()) ? flaw : -1;
  flaws_matter = planted >= 0;
}

void enter_kernel(const char* name) { running = name; }

[[gnu::noinline]] bool has_flaw(Flaw flaw, const Where& where) {
  const void* instance = counts_instances(flaw) ? __builtin_return_address(0) : nullptr;
  const Place here = {running, flaw, where, instance};
  if (!watching) return seen[size_t(planted)] == here;
  if (std::find(seen.begin(), seen.end(), here) == seen.end()) seen.push_back(here);
  return false;
}

cuda::Tiles visited(cuda::Tiles tiles, const Where& where) {
  const bool any = tiles.begin < tiles.end;
  if (any && flawed(Flaw::late_begin, where)) ++tiles.begin;
  if (any && flawed(Flaw::early_end, where)) --tiles.end;
  if (tiles.begin < tiles.full_begin && flawed(Flaw::early_full, where)) --tiles.full_begin;
  if (tiles.full_end < tiles.end && flawed(Flaw::late_full, where)) ++tiles.full_end;
  return tiles;
}

}  // namespace fusedattn::emulator
