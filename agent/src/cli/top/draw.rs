//! Draws what top shows. Every foreign name passes [`shown`].

use ratatui::{
    Frame,
    layout::{Constraint, Layout},
    style::{Color, Modifier, Style},
    text::{Line, Span},
    widgets::{Cell, Paragraph, Row as TableRow, Table},
};

use super::model::{Model, Pair, Row, View};
use crate::cli::{
    connections::{data_path, path_and_reason, way},
    output::{age, bytes, or_none, shown},
};

/// Lines above the table: node, state, connections, rates, and one that is empty.
const HEADER: u16 = 5;

pub(super) fn draw(frame: &mut Frame<'_>, model: &mut Model) {
    let [header, table, footer] =
        Layout::vertical([Constraint::Length(HEADER), Constraint::Min(1), Constraint::Length(1)]).areas(frame.area());
    // The table has a line of headings.
    model.page = usize::from(table.height.saturating_sub(1)).max(1);
    frame.render_widget(Paragraph::new(summary(model)), header);
    match model.view {
        View::Connections => frame.render_widget(connections(model), table),
        View::Identities => frame.render_widget(identities(model), table),
    }
    frame.render_widget(Paragraph::new(keys(model)), footer);
}

fn bold(text: impl Into<String>) -> Span<'static> {
    Span::styled(text.into(), Style::new().add_modifier(Modifier::BOLD))
}

fn summary(model: &Model) -> Vec<Line<'static>> {
    let s = &model.sample.status;
    let enrolled = s.pods.iter().filter(|p| p.pod_id.is_some()).count();
    let state = match &model.error {
        Some(error) => Line::styled(format!("NO ANSWER: {}", shown(error)), Style::new().fg(Color::Red)),
        None if model.paused => Line::styled("paused", Style::new().fg(Color::Yellow)),
        None => Line::raw(format!(
            "{enrolled} of {} pods enrolled, configuration {}, tunnels use {}",
            s.pods.len(),
            s.generation,
            data_path(s.data_path)
        )),
    };
    let total = &model.total;
    let listed = model.rows.len();
    let all = model.sample.connections.total;
    let of = if all > listed { format!(" (looking at {listed})") } else { String::new() };
    let refused: u64 = model.sample.counters.agent.refused.values().sum();
    vec![
        Line::from(vec![
            bold("underpass top"),
            Span::raw(format!("  node {}, {}, version {}", shown(&s.node), shown(&s.trust_domain), shown(&s.version))),
        ]),
        state,
        Line::from(vec![
            bold(format!("{all} connections")),
            Span::raw(format!(
                "{of}: {} ktls, {} user, {} plain; {:.1} tunnels/s, {refused} refused so far",
                total.ktls, total.user, total.plain, model.opened
            )),
        ]),
        Line::raw(format!(
            "sent {}/s, received {}/s; {} moved by connections that are open",
            bytes(total.rate.sent),
            bytes(total.rate.received),
            bytes(total.bytes)
        )),
        Line::raw(""),
    ]
}

fn table(headings: &[&'static str], widths: &[Constraint], rows: Vec<TableRow<'static>>) -> Table<'static> {
    let header = TableRow::new(headings.to_vec()).style(Style::new().add_modifier(Modifier::REVERSED));
    Table::new(rows, widths.to_vec()).header(header).column_spacing(1)
}

fn cells(texts: impl IntoIterator<Item = String>) -> TableRow<'static> {
    TableRow::new(texts.into_iter().map(|text| Cell::new(shown(&text).into_owned())))
}

fn connections(model: &Model) -> Table<'static> {
    let domain = &model.sample.status.trust_domain;
    let row = |Row { info: c, rate }: &Row| {
        cells([
            c.id.0.to_string(),
            age(c.age_s),
            way(c.direction).to_owned(),
            c.workload.clone(),
            short(c.source_identity.as_deref(), domain),
            short(c.destination_identity.as_deref(), domain),
            c.original_destination.to_string(),
            path_and_reason(c),
            format!("{}/s", bytes(rate.sent)),
            format!("{}/s", bytes(rate.received)),
            bytes(c.sent.saturating_add(c.received)),
        ])
    };
    let rows = model.rows.iter().skip(model.offset).take(model.page).map(row).collect();
    let (fill, fixed) = (Constraint::Fill(1), Constraint::Length);
    table(
        &["ID", "AGE", "WAY", "WORKLOAD", "CLIENT", "SERVER", "DESTINATION", "PATH", "SENT", "RECEIVED", "BYTES"],
        &[fixed(7), fixed(8), fixed(3), fill, fill, fill, fill, fixed(18), fixed(12), fixed(12), fixed(11)],
        rows,
    )
}

fn identities(model: &Model) -> Table<'static> {
    let row = |p: &Pair| {
        cells([
            or_none(p.client.as_deref()).to_owned(),
            or_none(p.server.as_deref()).to_owned(),
            p.connections.to_string(),
            p.ktls.to_string(),
            p.user.to_string(),
            p.plain.to_string(),
            format!("{}/s", bytes(p.rate.sent)),
            format!("{}/s", bytes(p.rate.received)),
            bytes(p.bytes),
        ])
    };
    let rows = model.pairs.iter().skip(model.offset).take(model.page).map(row).collect();
    let (fill, fixed) = (Constraint::Fill(1), Constraint::Length);
    table(
        &["CLIENT IDENTITY", "SERVER IDENTITY", "CONNECTIONS", "KTLS", "USER", "PLAIN", "SENT", "RECEIVED", "BYTES"],
        &[fill, fill, fixed(11), fixed(6), fixed(6), fixed(6), fixed(12), fixed(12), fixed(11)],
        rows,
    )
}

/// An identity without what all of the node's own trust domain have in common: `ns/shop/sa/web`.
fn short(identity: Option<&str>, trust_domain: &str) -> String {
    let text = or_none(identity);
    let rest = text.strip_prefix("spiffe://").and_then(|id| id.strip_prefix(trust_domain)?.strip_prefix('/'));
    rest.unwrap_or(text).to_owned()
}

fn keys(model: &Model) -> Line<'static> {
    let shown = model.len().min(model.offset + model.page);
    Line::styled(
        format!(
            "{}-{shown} of {}  order: {}  q quit  s order  Tab connections/identities  p pause  arrows scroll",
            (model.offset + 1).min(shown),
            model.len(),
            model.sort.as_str()
        ),
        Style::new().add_modifier(Modifier::DIM),
    )
}
