//! Where results go in the documentation: between two comments in `docs/performance.md`.

use std::fmt;

use anyhow::{Context, Result};

use crate::vm::Series;

/// What a run was made on; names its place in the page and its files.
#[derive(Debug, Clone, Copy)]
pub(super) struct Kind {
    pub(super) vm: Option<Series>,
    pub(super) icount: bool,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.vm, self.icount) {
            (None, _) => f.write_str("host"),
            (Some(series), false) => write!(f, "vm-{series}"),
            (Some(series), true) => write!(f, "instructions-{series}"),
        }
    }
}

/// The page with new tables for a kind of run.
pub(super) fn insert(page: &str, kind: Kind, tables: &str) -> Result<String> {
    let (begin, end) = (format!("<!-- bench {kind} -->\n"), format!("<!-- end of bench {kind} -->"));
    let missing =
        || format!("docs/performance.md has no lines `{}` and `{end}` to put the tables between", begin.trim());
    let (before, rest) = page.split_once(&begin).with_context(missing)?;
    let (_, after) = rest.split_once(&end).with_context(missing)?;
    Ok(format!("{before}{begin}{tables}\n{end}{after}"))
}

#[cfg(test)]
mod tests {
    use super::{Kind, insert};

    #[test]
    fn tables_are_replaced_where_they_belong() {
        let kind = Kind { vm: None, icount: false };
        let page = "a\n<!-- bench host -->\nold\n<!-- end of bench host -->\nb\n";
        let new = insert(page, kind, "\n| new |\n").unwrap();
        assert_eq!(new, "a\n<!-- bench host -->\n\n| new |\n\n<!-- end of bench host -->\nb\n");
        assert_eq!(insert(&new, kind, "\n| new |\n").unwrap(), new);
        assert!(insert("nothing", kind, "").unwrap_err().to_string().contains("bench host"));
    }
}
