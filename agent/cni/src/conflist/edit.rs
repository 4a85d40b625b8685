//! Cutting and pasting in a text.

use std::ops::Range;

/// Where a part that was borrowed from `text` stands in it.
pub(super) fn range_of(text: &str, part: &str) -> Range<usize> {
    let start = part.as_ptr().addr() - text.as_ptr().addr();
    start..start + part.len()
}

pub(super) fn replace(text: &str, range: &Range<usize>, by: &str) -> String {
    [&text[..range.start], by, &text[range.end..]].concat()
}

pub(super) fn insert(text: &str, at: usize, what: &str) -> String {
    replace(text, &(at..at), what)
}

/// Leaves out the elements of an array that are not to be kept, each with the separator before it (with the one
/// behind it where it is the first). `inside` is what the array's brackets enclose.
pub(super) fn retain(text: &str, inside: &Range<usize>, elements: &[(Range<usize>, bool)]) -> String {
    let mut kept = String::with_capacity(text.len());
    kept.push_str(&text[..inside.start]);
    let first = elements.first().map_or(inside.end, |(at, _)| at.start);
    kept.push_str(&text[inside.start..first]);
    let mut any = false;
    let mut before = first;
    for (at, keep) in elements {
        if *keep {
            kept.push_str(if any { &text[before..at.end] } else { &text[at.clone()] });
            any = true;
        }
        before = at.end;
    }
    kept.push_str(&text[before..]);
    kept
}
