//! Tables as people see them. `UPDATE_EXPECT=1 cargo test tables_for_people` writes them anew.

use expect_test::expect;

use super::samples::{a_report, a_status, connections, explanations, policies, services, workloads};
use crate::cli::output::{Style, View as _};

#[test]
fn tables_for_people() {
    let name = "shop/other";
    expect![[""]].assert_eq(&a_status(name).table(Style::TABLE));
    expect![[""]].assert_eq(&a_status(name).table(Style::WIDE));
    expect![[""]].assert_eq(&workloads(name).table(Style::TABLE));
    expect![[""]].assert_eq(&workloads(name).table(Style::WIDE));
    expect![[""]].assert_eq(&services(name).table(Style::TABLE));
    expect![[""]].assert_eq(&services(name).table(Style::WIDE));
    expect![[""]].assert_eq(&policies(name).table(Style::TABLE));
    expect![[""]].assert_eq(&explanations(name).table(Style::TABLE));
    expect![[""]].assert_eq(&a_report(name).table(Style::TABLE));
    expect![[""]].assert_eq(&a_report(name).table(Style::WIDE));
    expect![[""]].assert_eq(&connections(name).table(Style::TABLE));
    expect![[""]].assert_eq(&connections(name).table(Style::WIDE));
}
