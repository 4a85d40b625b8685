//! Charts: horizontal bars, relative to plain TCP, because that is what can be compared between machines.

use anyhow::{Result, anyhow};
use plotters::{
    coord::Shift,
    prelude::{ChartBuilder, DrawingArea, IntoDrawingArea, PathElement, Rectangle, SVGBackend, Text},
    style::{
        Color, FontStyle, IntoFont, RGBColor, TextStyle,
        text_anchor::{HPos, Pos, VPos},
    },
};

use super::{docs::Kind, row::Row, system::NAMES};

/// Pixels.
const WIDTH: u32 = 900;
const BAR: u32 = 18;
const MARGINS: u32 = 90;
/// Distinguishable also without colours seen (Okabe and Ito's palette).
const COLOURS: [RGBColor; NAMES.len() + 1] = [
    RGBColor(150, 150, 150),
    RGBColor(240, 228, 66),
    RGBColor(204, 121, 167),
    RGBColor(230, 159, 0),
    RGBColor(213, 94, 0),
    RGBColor(86, 180, 233),
    RGBColor(0, 114, 178),
    RGBColor(0, 158, 115),
];

/// A bar: what it is of, the system's number, and how long it is.
struct Bar<'a> {
    case: &'a str,
    system: &'a str,
    length: f64,
}

/// Names of files, and their contents.
pub(super) fn draw(kind: Kind, rows: &[Row]) -> Result<Vec<(String, String)>> {
    let plain = |row: &Row| {
        let case = row.case.trim_end_matches("-cold");
        rows.iter().find(|other| other.system == "plain" && other.case == case)
    };
    let values = bars(rows, |row| row.ratio_to_plain);
    let costs = bars(rows, |row| Some(row.programs_cpu_s? / plain(row)?.programs_cpu_s?));
    let value =
        if kind.icount { "Instructions, plain TCP = 1: less is better" } else { "Rate, plain TCP = 1: more is better" };
    let mut all = Vec::new();
    for (name, title, bars) in
        [("rate", value, values), ("cpu", "CPU time of all programs, plain TCP = 1: less is better", costs)]
    {
        // Instructions are the cost.
        let counted_already = kind.icount && name == "cpu";
        if !bars.is_empty() && !counted_already {
            all.push((format!("{kind}-{name}.svg"), chart(&format!("{title} ({kind})"), &bars)?));
        }
    }
    Ok(all)
}

/// One for every row of which the number is known, without plain TCP, which is 1.
fn bars<'a>(rows: &'a [Row], number: impl Fn(&Row) -> Option<f64>) -> Vec<Bar<'a>> {
    let bar = |row: &'a Row| {
        let length = number(row).filter(|length| length.is_finite())?;
        (row.system != "plain" && !row.case.starts_with("idle")).then_some(Bar {
            case: &row.case,
            system: &row.system,
            length,
        })
    };
    rows.iter().filter_map(bar).collect()
}

fn chart(title: &str, bars: &[Bar<'_>]) -> Result<String> {
    let mut svg = String::new();
    let area = SVGBackend::with_string(&mut svg, (WIDTH, BAR * bars.len() as u32 + MARGINS)).into_drawing_area();
    paint(&area, title, bars).map_err(|error| anyhow!("drawing {title:?}: {error}"))?;
    drop(area);
    Ok(svg)
}

fn paint(
    area: &DrawingArea<SVGBackend<'_>, Shift>,
    title: &str,
    bars: &[Bar<'_>],
) -> Result<(), Box<dyn std::error::Error>> {
    let longest = bars.iter().map(|bar| bar.length).fold(1.0, f64::max) * 1.12;
    let count = bars.len() as f64;
    area.fill(&RGBColor(255, 255, 255))?;
    let font = |size: u32| ("sans-serif", size).into_font();
    let mut chart = ChartBuilder::on(area)
        .caption(title, font(16).style(FontStyle::Bold))
        .margin(12)
        .x_label_area_size(30)
        .y_label_area_size(230)
        .build_cartesian_2d(0.0..longest, 0.0..count)?;
    chart.configure_mesh().disable_y_mesh().disable_y_axis().x_labels(8).label_style(font(12)).draw()?;
    let right = TextStyle::from(font(12)).pos(Pos::new(HPos::Right, VPos::Center));
    let left = TextStyle::from(font(11)).pos(Pos::new(HPos::Left, VPos::Center));
    for (index, bar) in bars.iter().enumerate() {
        let middle = count - index as f64 - 0.5;
        // The same in every chart; whatever comes besides shares the last one.
        let colour = COLOURS[NAMES.iter().position(|name| *name == bar.system).unwrap_or(NAMES.len())];
        chart.draw_series([Rectangle::new([(0.0, middle - 0.4), (bar.length, middle + 0.4)], colour.filled())])?;
        let (x, y) = chart.backend_coord(&(0.0, middle));
        area.draw(&Text::new(format!("{}  {}", bar.case, bar.system), (x - 6, y), right.clone()))?;
        let (x, y) = chart.backend_coord(&(bar.length, middle));
        area.draw(&Text::new(format!("{:.2}", bar.length), (x + 4, y), left.clone()))?;
    }
    let one = [(1.0, 0.0), (1.0, count)];
    chart.draw_series([PathElement::new(one, RGBColor(0, 0, 0))])?;
    area.present()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::{
        super::{docs::Kind, row::Row},
        draw,
    };

    #[test]
    fn a_chart_has_a_bar_for_each_system() {
        let rows = [
            Row::single("bulk1", "plain", 10.0, "Gbit/s", Some(1.0)),
            Row::single("bulk1", "nginx", 5.5, "Gbit/s", Some(0.55)),
            Row::single("idle10k", "nginx", 5.5, "B", None),
        ];
        let charts = draw(Kind { vm: None, icount: false }, &rows).unwrap();
        let [(name, svg)] = &charts[..] else { panic!("no costs, so one chart: {charts:?}") };
        assert_eq!(name, "host-rate.svg");
        assert!(svg.starts_with("<svg") && svg.contains("bulk1  nginx") && svg.contains("0.55"), "{svg}");
        assert!(!svg.contains("idle10k"));
    }
}
