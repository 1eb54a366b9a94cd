//! The screen: the pipeline with the pressure on every link, and the numbers beside it.

use ratatui::Frame;
use ratatui::buffer::Buffer;
use ratatui::layout::Rect;
use ratatui::style::{Color, Style, Stylize};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Paragraph, Widget};

use super::view::{Link, Times, View};

/// Cells of a bar: at 1 it is full.
const BAR_CELLS: u64 = 20;

/// A frame printed as text is as wide as this.
const TEXT_COLUMNS: u16 = 100;

pub(super) struct Screen<'a> {
    pub name: &'a str,
    pub view: &'a View,
    /// Why the numbers are not of now.
    pub gone: Option<&'a str>,
}

impl<'a> Screen<'a> {
    pub fn new(name: &'a str, view: &'a View) -> Screen<'a> {
        Screen { name, view, gone: None }
    }

    pub fn draw(&self, frame: &mut Frame<'_>) {
        frame.render_widget(Paragraph::new(self.lines()), frame.area());
    }

    /// The same as text, for where there is no terminal.
    pub fn text(&self) -> String {
        let lines = self.lines();
        let area = Rect::new(0, 0, TEXT_COLUMNS, lines.len() as u16);
        let mut buffer = Buffer::empty(area);
        Paragraph::new(lines).render(area, &mut buffer);
        let row = |y| {
            let cells = (0..area.width).map(|x| buffer[(x, y)].symbol());
            cells.collect::<String>().trim_end().to_owned() + "\n"
        };
        (0..area.height).map(row).collect()
    }

    fn lines(&self) -> Vec<Line<'static>> {
        let view = self.view;
        let mut lines = vec![self.title()];
        lines.push(match self.gone {
            Some(why) => Line::from(format!("no answer, trying again: {why}")).red().bold(),
            None => Line::default(),
        });
        if view.server.is_empty() {
            return lines;
        }
        let mut arrow = "   ";
        for link in &view.links {
            lines.push(pressure(arrow, link));
            arrow = " ↓ ";
        }
        lines.push(Line::default());
        lines.push(plain(format!(
            "λ {:.2}/s   let in {:.2}/s   μ {:.2}/s   λ/μ {:.2}   L {:.1}   in the system {}",
            view.arrivals_per_second,
            view.effective_per_second,
            view.service_per_second,
            view.utilisation,
            view.jobs,
            view.jobs_now,
        )));
        lines.push(plain(format!(
            "tokens/s   out {:.1}   in {:.1}   computed again {:.1}   preemptions/s {:.1}",
            view.tokens_out_per_second,
            view.tokens_in_per_second,
            view.recomputed_per_second,
            view.preemptions_per_second,
        )));
        lines.push(times("TTFT", view.ttft));
        lines.push(times("ITL", view.itl));
        lines.push(times("in queue", view.queue));
        let refusals = view.refusals.iter().map(|(reason, rate)| format!("{reason} {rate:.1}"));
        lines.push(plain(format!(
            "refusals/s {:.1}   {}",
            view.refusals_per_second,
            refusals.collect::<Vec<_>>().join(", "),
        )));
        let error = |percent: Option<f64>| {
            percent.map_or("-".to_owned(), |percent| format!("{percent:.0} %"))
        };
        lines.push(plain(format!(
            "foresight is off by   TTFT {}   step {}",
            error(view.ttft_error_percent),
            error(view.step_error_percent),
        )));
        lines
    }

    fn title(&self) -> Line<'static> {
        let View { model, server, window_s, .. } = self.view;
        let mut title = vec![Span::from(format!("forebay top  {}", self.name)).bold()];
        if !server.is_empty() {
            title.push(format!("  {server}  {model}  last {window_s:.0} s").into());
        }
        title.push("  q quits".dim());
        Line::from(title)
    }
}

fn plain(text: String) -> Line<'static> {
    Line::from(format!("   {text}"))
}

/// `↓ queue    ██████··············   30 %  what is in it`.
fn pressure(arrow: &str, link: &Link) -> Line<'static> {
    let permille = link.pressure_permille;
    let full = (permille * BAR_CELLS).div_ceil(1_000).min(BAR_CELLS) as usize;
    let style = Style::new().fg(match permille {
        0..700 => Color::Green,
        700..1_000 => Color::Yellow,
        _ => Color::Red,
    });
    Line::from(vec![
        Span::from(format!("{arrow}{:<8}", link.name)),
        Span::styled("█".repeat(full), style),
        "·".repeat(BAR_CELLS as usize - full).dim(),
        Span::styled(format!("{:>6} %  ", permille / 10), style),
        link.detail.clone().into(),
    ])
}

fn times(name: &str, times: Option<Times>) -> Line<'static> {
    let text = match times {
        Some(Times { p50, p90, p99 }) => {
            format!("{name:<9}  p50 {p50:.0} ms   p90 {p90:.0} ms   p99 {p99:.0} ms")
        }
        None => format!("{name:<9}  -"),
    };
    plain(text)
}

#[cfg(test)]
mod tests {
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;

    use super::super::view::tests::busy;
    use super::*;

    fn drawn(screen: &Screen<'_>, columns: u16, rows: u16) -> TestBackend {
        let mut terminal = Terminal::new(TestBackend::new(columns, rows)).unwrap();
        terminal.draw(|frame| screen.draw(frame)).unwrap();
        terminal.backend().clone()
    }

    #[test]
    fn every_link_has_a_bar_and_a_number_and_the_order_is_the_pipelines() {
        let view = busy();
        let backend = drawn(&Screen::new("here:7070", &view), 100, 24);
        let text = backend.to_string();
        let at =
            |part: &str| text.find(part).unwrap_or_else(|| panic!("{part:?} is not in {text}"));
        let order = ["front", "queue", "prefill", "batch", "KV", "device", "egress"];
        assert!(order.map(at).is_sorted(), "{text}");
        at(&format!("batch   {}   250 %  running 2", "█".repeat(20)));
        at(&format!("device  {}{}    50 %", "█".repeat(10), "·".repeat(10)));
        at("λ 2.50/s");
        at("p50 50 ms   p90 90 ms");
        at("refusals/s 2.0   queue_full 2.0");
        at("TTFT 25 %   step -");
        // What is over its set point is seen from afar.
        let bar = backend.buffer().cell((11, 5)).unwrap();
        assert_eq!((bar.symbol(), bar.fg), ("█", Color::Red));
    }

    #[test]
    fn a_frame_as_text_is_what_a_terminal_shows() {
        let view = busy();
        let screen = Screen::new("here:7070", &view);
        let text = screen.text();
        let rows = text.lines().count() as u16;
        let shown = drawn(&screen, TEXT_COLUMNS, rows).to_string();
        for (line, shown) in text.lines().zip(shown.lines()) {
            assert_eq!(line, shown.trim_matches('"').trim_end());
        }
    }

    #[test]
    fn a_server_that_is_gone_is_said_to_be_and_its_last_numbers_stay() {
        let view = busy();
        let screen = Screen { gone: Some("connection refused"), ..Screen::new("here", &view) };
        let text = drawn(&screen, 100, 24).to_string();
        assert!(text.contains("no answer, trying again: connection refused"), "{text}");
        assert!(text.contains("running 2"), "{text}");
        let nothing = View::default();
        let never = Screen { gone: Some("refused"), ..Screen::new("here", &nothing) };
        assert!(drawn(&never, 40, 3).to_string().contains("no answer"));
    }

    #[test]
    fn a_terminal_of_any_size_is_drawn_on() {
        let view = busy();
        for (columns, rows) in [(1, 1), (20, 3), (300, 100)] {
            drawn(&Screen::new("here", &view), columns, rows);
        }
    }
}
