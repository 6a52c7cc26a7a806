//! What the demo prints: steps that scroll by, and below them one table that is redrawn in place on a terminal.
//!
//! Owns the form: widths, colours, what differs without a terminal (no colours, and a table only where it is asked
//! for). Never decides what is shown.

use std::fmt::Display;
use std::io::{self, IsTerminal, Write as _};
use std::time::{Duration, Instant};

/// Columns of a step's line before its time.
const WIDTH: usize = 84;

/// How often the table is redrawn.
const FRAME: Duration = Duration::from_millis(100);

/// A colour of the terminal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ink {
    Bold,
    Dim,
    Red,
    Green,
    Yellow,
    Blue,
    Magenta,
}

/// Standard output.
#[derive(Debug)]
pub(crate) struct Screen {
    is_terminal: bool,
    has_colours: bool,
    /// Lines of the table that stand at the bottom of the terminal.
    table: Vec<String>,
    drawn: Instant,
}

impl Screen {
    pub(crate) fn new() -> Self {
        let is_terminal =
            io::stdout().is_terminal() && std::env::var_os("TERM").is_some_and(|is| is != "dumb");
        let has_colours = is_terminal && std::env::var_os("NO_COLOR").is_none_or(|is| is.is_empty());
        Self { is_terminal, has_colours, table: Vec::new(), drawn: Instant::now() }
    }

    /// Whether what is printed can be replaced.
    pub(crate) fn is_live(&self) -> bool {
        self.is_terminal
    }

    pub(crate) fn paint(&self, ink: Ink, text: impl Display) -> String {
        if !self.has_colours {
            return text.to_string();
        }
        let code = match ink {
            Ink::Bold => 1,
            Ink::Dim => 2,
            Ink::Red => 31,
            Ink::Green => 32,
            Ink::Yellow => 33,
            Ink::Blue => 34,
            Ink::Magenta => 35,
        };
        format!("\x1b[{code}m{text}\x1b[0m")
    }

    /// Prints a line above the table.
    pub(crate) fn say(&mut self, line: impl Display) {
        let erased = self.erased();
        self.write(&format!("{erased}{line}\n{}", self.lines(&self.table)));
    }

    /// Prints what has been reached, and how long it took.
    pub(crate) fn done(&mut self, text: &str, took: Duration) {
        let padding = WIDTH.saturating_sub(text.chars().count());
        let (mark, took) =
            (self.paint(Ink::Green, "✓"), self.paint(Ink::Bold, format!("{:>10}", millis(took))));
        self.say(format!("  {mark} {text}{:padding$}{took}", ""));
    }

    /// Prints a remark on the step before.
    pub(crate) fn note(&mut self, text: &str) {
        let text = self.paint(Ink::Dim, text);
        self.say(format!("    {text}"));
    }

    /// Redraws the table if it is time to: on a terminal only.
    pub(crate) fn draw(&mut self, table: impl FnOnce(&Self) -> Vec<String>) {
        if self.is_terminal && self.drawn.elapsed() >= FRAME {
            self.place(table);
        }
    }

    /// Shows the table as it is now: on a terminal in place of the one before.
    pub(crate) fn place(&mut self, table: impl FnOnce(&Self) -> Vec<String>) {
        let table = table(self);
        let erased = self.erased();
        self.write(&format!("{erased}{}", self.lines(&table)));
        if self.is_terminal {
            self.table = table;
            self.drawn = Instant::now();
        }
    }

    /// Leaves the table where it stands: what is printed next comes below it.
    pub(crate) fn release_table(&mut self) {
        self.table.clear();
    }

    /// The lines of a table, cut at the edge of a terminal that is too narrow: it would wrap them, and nobody would know
    /// how many there are.
    fn lines(&self, table: &[String]) -> String {
        let text: String = table.iter().map(|line| format!("{line}\n")).collect();
        if self.is_terminal { format!("\x1b[?7l{text}\x1b[?7h") } else { text }
    }

    /// What takes the table away.
    fn erased(&self) -> String {
        match self.table.len() {
            0 => String::new(),
            height => format!("\x1b[{height}A\x1b[J"),
        }
    }

    /// Nobody may be reading any more; the demo's outcome is its exit code.
    fn write(&self, text: &str) {
        let mut stdout = io::stdout().lock();
        let _ = stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush());
    }
}

/// A time as the demo prints it: three digits at most behind the point, fewer where they say nothing.
pub(crate) fn millis(time: Duration) -> String {
    let millis = time.as_secs_f64() * 1e3;
    match millis {
        0.0..10.0 => format!("{millis:.1} ms"),
        10.0..1000.0 => format!("{millis:.0} ms"),
        _ => format!("{:.1} s", millis / 1e3),
    }
}
