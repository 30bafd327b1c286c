//! `docs/sdk.md` against the routes that there are.

use super::super::{morph, nullspace};
use std::collections::BTreeSet;

const PAGE: &str = include_str!("../../../../docs/sdk.md");

/// Routes in the last column of the page's tables, between two headings.
fn documented(section: &str) -> BTreeSet<String> {
    let begin = PAGE.find(&format!("\n## {section}\n")).unwrap() + 1;
    let rest = &PAGE[begin + 1..];
    let body = &rest[..rest.find("\n## ").unwrap_or(rest.len())];
    let cells = body.lines().filter(|line| line.starts_with('|'));
    let last = cells.filter_map(|line| line.trim_end_matches('|').rsplit('|').next());
    last.filter_map(|cell| {
        cell.trim()
            .strip_prefix('`')?
            .strip_suffix('`')
            .map(str::to_owned)
    })
    .collect()
}

fn compare(section: &str, built: Vec<String>) {
    let built: BTreeSet<String> = built.into_iter().collect();
    let documented = documented(section);
    let missing: Vec<_> = built.difference(&documented).collect();
    let gone: Vec<_> = documented.difference(&built).collect();
    assert!(missing.is_empty(), "not in docs/sdk.md: {missing:#?}");
    assert!(gone.is_empty(), "in docs/sdk.md and not built: {gone:#?}");
}

#[test]
fn the_page_shows_what_is_built_for_morph() {
    compare("Morph", morph::table().lines());
}

#[test]
fn the_page_shows_what_is_built_for_nullspace() {
    compare("Nullspace", nullspace::table().lines());
}

#[test]
fn the_page_of_the_native_api_shows_every_route_and_no_other() {
    let page = include_str!("../../../../docs/api.md");
    let built: BTreeSet<String> = super::super::table().lines().into_iter().collect();
    let quoted = page.split('`').filter(|text| text.contains(" /v1/"));
    let documented: BTreeSet<String> = quoted
        .filter(|text| !text.contains('\n'))
        .map(str::to_owned)
        .collect();
    let missing: Vec<_> = built.difference(&documented).collect();
    let gone: Vec<_> = documented.difference(&built).collect();
    assert!(missing.is_empty(), "not in docs/api.md: {missing:#?}");
    assert!(gone.is_empty(), "in docs/api.md and not served: {gone:#?}");
}
