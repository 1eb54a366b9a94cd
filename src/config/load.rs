//! From a file's text, the environment and flags to a [`Config`], or to all that is wrong.

use std::collections::BTreeSet;
use std::fmt::Write;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::Config;
use super::problem::{Origin, Problem, Problems};
use super::setting::{Found, SETTINGS, Setting, TENANT, TENANTS, find};
use super::suggest::nearest;
use super::value::{Allowed, Value};
use crate::request::Name;

/// A configuration file that was read.
#[derive(Clone, Copy, Debug)]
pub struct TomlFile<'a> {
    /// Its path, for messages.
    pub path: &'a str,
    /// Its contents.
    pub text: &'a str,
}

/// A setting that was given on the command line.
#[derive(Clone, Debug)]
pub struct Flag {
    /// The flag as it was written, for messages: `--listen`, `--set`.
    pub flag: String,
    /// The setting's key.
    pub key: String,
    /// Its value.
    pub value: String,
}

/// A configuration, and where each of its settings came from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Loaded {
    /// The settings.
    pub config: Config,
    origins: Vec<Origin>,
    /// Settings of single tenants, each once, in the order in which they were given.
    for_one: Vec<ForOne>,
}

/// A setting of a single tenant.
#[derive(Clone, Debug, PartialEq, Eq)]
struct ForOne {
    tenant: Name,
    /// Of the setting for all tenants, in the table of settings.
    index: usize,
    value: Value,
    origin: Origin,
}

/// Environment variables of ours that are no settings: the log filter, the configuration file's
/// path, and whatever tests pass to each other.
fn is_no_setting(name: &str) -> bool {
    matches!(name, "FOREBAY_LOG" | "FOREBAY_CONFIG") || name.starts_with("FOREBAY_TEST_")
}

/// Builds the configuration. Of `variables`, only those whose name begins with `FOREBAY_` count.
pub fn load(
    file: Option<TomlFile<'_>>,
    variables: impl IntoIterator<Item = (String, String)>,
    flags: &[Flag],
) -> Result<Loaded, Problems> {
    let mut loader = Loader::default();
    if let Some(file) = file {
        loader.file(file);
    }
    let ours = variables.into_iter().filter(|(name, _)| name.starts_with("FOREBAY_"));
    let mut ours: Vec<_> = ours.filter(|(name, _)| !is_no_setting(name)).collect();
    ours.sort(); // the environment has no order, messages should
    for (name, value) in ours {
        loader.variable(&name, &value);
    }
    for flag in flags {
        let origin = Origin::Flag(flag.flag.clone());
        loader.text(&flag.key, &flag.value, origin);
    }
    loader.finish()
}

#[derive(Default)]
struct Loader {
    loaded: Loaded,
    problems: Vec<Problem>,
    /// Settings whose value is wrong: what follows from them is not reported on top.
    wrong: BTreeSet<&'static str>,
}

impl Default for Loaded {
    fn default() -> Loaded {
        Loaded {
            config: Config::default(),
            origins: vec![Origin::Default; SETTINGS.len()],
            for_one: Vec::new(),
        }
    }
}

impl Loader {
    fn file(&mut self, file: TomlFile<'_>) {
        let line = |offset: usize| 1 + file.text[..offset].matches('\n').count();
        let origin = |offset| Origin::File { path: file.path.to_owned(), line: line(offset) };
        let (table, errors) = DeTable::parse_recoverable(file.text);
        if !errors.is_empty() {
            // What a broken file seems to say is not worth reporting.
            self.problems.extend(errors.iter().map(|error| Problem {
                key: String::new(),
                value: None,
                origin: origin(error.span().map_or(0, |span| span.start.min(file.text.len()))),
                what: error.message().to_owned(),
            }));
            return;
        }
        for (section, value) in in_order(table.get_ref()) {
            self.section(section.get_ref(), section.span().start, value, &origin);
        }
    }

    /// A table of settings; that of `tenant` holds one of them for each tenant.
    fn section(
        &mut self,
        section: &str,
        start: usize,
        value: &Spanned<DeValue<'_>>,
        origin: &impl Fn(usize) -> Origin,
    ) {
        let DeValue::Table(entries) = value.get_ref() else {
            return self.unknown(section, None, origin(start));
        };
        for (name, value) in in_order(entries) {
            let (key, start) = (format!("{section}.{}", name.get_ref()), name.span().start);
            match section {
                TENANT => self.section(&key, start, value, origin),
                _ => self.toml(&key, value, origin(start)),
            }
        }
    }

    fn toml(&mut self, key: &str, value: &Spanned<DeValue<'_>>, origin: Origin) {
        let Some(Found { setting, .. }) = find(key) else {
            return self.unknown(key, None, origin);
        };
        let as_text = match value.get_ref() {
            DeValue::String(text) => Some(text.to_string()),
            DeValue::Integer(n) if setting.allowed.is_number() => {
                // Any base, and values beyond every range: only then it is not a number at all.
                i128::from_str_radix(n.as_str(), n.radix()).ok().map(|n| n.to_string())
            }
            _ => None,
        };
        match as_text {
            Some(text) => self.text(key, &text, origin),
            None => {
                let what = format!("{}, not {}", setting.allowed, a_kind(value.get_ref()));
                self.wrong(key, setting, None, origin, what);
            }
        }
    }

    fn variable(&mut self, name: &str, value: &str) {
        let origin = Origin::Variable(name.to_owned());
        if let Some(setting) = SETTINGS.iter().find(|setting| setting.variable() == name) {
            return self.text(setting.key, value, origin);
        }
        let names: Vec<String> = SETTINGS.iter().map(Setting::variable).collect();
        let nearest = nearest(name, names.iter().map(String::as_str));
        let what = format!("no setting is called so{}", did_you_mean(nearest));
        self.problems.push(Problem { key: name.to_owned(), value: None, origin, what });
    }

    fn text(&mut self, key: &str, text: &str, origin: Origin) {
        let Some(Found { index, setting, tenant }) = find(key) else {
            return self.unknown(key, Some(text), origin);
        };
        match (setting.allowed.parse(text), tenant) {
            (Ok(value), None) => {
                (setting.set)(&mut self.loaded.config, value);
                self.loaded.origins[index] = origin;
            }
            (Ok(value), Some(tenant)) => match Name::new(tenant) {
                Some(tenant) => self.loaded.set_for_one(ForOne { tenant, index, value, origin }),
                None => {
                    let what = "a tenant's name has at most 63 bytes, none a control character";
                    self.wrong(key, setting, Some(text), origin, what.to_owned());
                }
            },
            (Err(what), _) => self.wrong(key, setting, Some(text), origin, what),
        }
    }

    fn wrong(
        &mut self,
        key: &str,
        setting: &Setting,
        text: Option<&str>,
        origin: Origin,
        what: String,
    ) {
        self.wrong.insert(setting.key);
        let value = text.map(|text| format!("{text:?}"));
        self.problems.push(Problem { key: key.to_owned(), value, origin, what });
    }

    fn unknown(&mut self, key: &str, text: Option<&str>, origin: Origin) {
        // A key without its section, or with a wrong one, is found by its last part.
        let last = key.rsplit('.').next().unwrap_or(key);
        let same_name = SETTINGS.iter().find(|s| s.key.rsplit('.').next() == Some(last));
        let nearest = nearest(key, SETTINGS.iter().map(|setting| setting.key))
            .or(same_name.map(|setting| setting.key));
        let what = format!("no setting is called so{}", did_you_mean(nearest));
        let value = text.map(|text| format!("{text:?}"));
        self.problems.push(Problem { key: key.to_owned(), value, origin, what });
    }

    fn finish(mut self) -> Result<Loaded, Problems> {
        self.loaded.name_tenants();
        self.check_tenants();
        for broken in self.loaded.config.limits.broken_relations() {
            let key = |field: &'static str| limit_key(field);
            let (low, high) = (key(broken.field), key(broken.than));
            if self.wrong.contains(low.key) || self.wrong.contains(high.key) {
                continue;
            }
            let what = format!(
                "must be {} {} = {} ({}): {}",
                broken.relation,
                high.key,
                self.loaded.shown(high),
                self.loaded.origin(high),
                broken.reason
            );
            self.problems.push(Problem {
                key: low.key.to_owned(),
                value: Some(self.loaded.shown(low)),
                origin: self.loaded.origin(low).clone(),
                what,
            });
        }
        if self.problems.is_empty() { Ok(self.loaded) } else { Err(Problems(self.problems)) }
    }
}

impl Loader {
    /// Those with settings of their own must have room.
    fn check_tenants(&mut self) {
        let limits = &self.loaded.config.limits;
        let named = limits.quotas.named.len();
        let setting = limit_key("tenants_max");
        if named > limits.tenants_max as usize && !self.wrong.contains(setting.key) {
            self.problems.push(Problem {
                key: setting.key.to_owned(),
                value: Some(self.loaded.shown(setting)),
                origin: self.loaded.origin(setting).clone(),
                what: format!(
                    "must be at least {named}: so many tenants have settings of their own"
                ),
            });
        }
    }
}

/// The setting of a field of [`crate::limits::Limits`].
fn limit_key(field: &'static str) -> &'static Setting {
    let is_it = |s: &&Setting| {
        let split = s.key.split_once('.');
        matches!(split, Some(("limits" | "stream", name)) if name == field)
    };
    let stream_name = field.strip_prefix("stream_").unwrap_or(field);
    SETTINGS
        .iter()
        .find(is_it)
        .or_else(|| SETTINGS.iter().find(|s| s.key == format!("stream.{stream_name}")))
        .expect("every limit is a setting")
}

/// A table's entries in the order of the file.
fn in_order<'a, 'i>(
    table: &'a DeTable<'i>,
) -> Vec<(&'a Spanned<toml::de::DeString<'i>>, &'a Spanned<DeValue<'i>>)> {
    let mut entries: Vec<_> = table.iter().collect();
    entries.sort_by_key(|(key, _)| key.span().start);
    entries
}

fn a_kind(value: &DeValue<'_>) -> &'static str {
    match value {
        DeValue::String(_) => "a text",
        DeValue::Integer(_) => "a number",
        DeValue::Float(_) => "a fraction",
        DeValue::Boolean(_) => "true or false",
        DeValue::Datetime(_) => "a date",
        DeValue::Array(_) => "a list",
        DeValue::Table(_) => "a table",
    }
}

/// A text as TOML quotes it, if it has no control characters.
fn quoted(text: &str) -> String {
    format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\""))
}

fn did_you_mean(nearest: Option<&str>) -> String {
    nearest.map(|name| format!("; did you mean {name}?")).unwrap_or_default()
}

impl Loaded {
    fn index(setting: &Setting) -> usize {
        find(setting.key).expect("it is from the table").index
    }

    fn origin(&self, setting: &Setting) -> &Origin {
        &self.origins[Loaded::index(setting)]
    }

    fn shown(&self, setting: &Setting) -> String {
        setting.allowed.show(&(setting.get)(&self.config))
    }

    /// All settings in force as a TOML file, each with its origin as a comment. Read back as a
    /// file, it gives the same configuration.
    pub fn to_toml(&self) -> String {
        let mut text = String::new();
        let mut section = "";
        for (setting, origin) in SETTINGS.iter().zip(&self.origins) {
            let (this, name) = setting.key.split_once('.').expect("every key has a section");
            if this != section {
                let gap = if section.is_empty() { "" } else { "\n" };
                let _ = writeln!(text, "{gap}[{this}]");
                section = this;
            }
            let line = format!("{name} = {}", self.shown(setting));
            let _ = writeln!(text, "{line:<38} # {origin}");
        }
        for (tenant, _) in &self.config.limits.quotas.named {
            let _ = writeln!(text, "\n[{TENANT}.{}]", quoted(tenant.as_str()));
            for ForOne { index, value, origin, .. } in
                self.for_one.iter().filter(|one| one.tenant == *tenant)
            {
                let Setting { key, allowed, .. } = &SETTINGS[*index];
                let name = key.strip_prefix(TENANTS).expect("it is for all tenants as well");
                let line = format!("{} = {}", &name[1..], allowed.show(value));
                let _ = writeln!(text, "{line:<38} # {origin}");
            }
        }
        text
    }

    /// The last value of a setting counts.
    fn set_for_one(&mut self, new: ForOne) {
        self.for_one.retain(|old| (old.tenant, old.index) != (new.tenant, new.index));
        self.for_one.push(new);
    }

    /// Builds each named tenant's quota: that of every tenant, with what was set for this one.
    fn name_tenants(&mut self) {
        let mut tenants: Vec<Name> = self.for_one.iter().map(|one| one.tenant).collect();
        tenants.sort_unstable();
        tenants.dedup();
        let of_all = self.config.limits.quotas.tenant;
        for tenant in tenants {
            // The settings' own table says where a value goes: for a moment, to everybody.
            for one in self.for_one.iter().filter(|one| one.tenant == tenant) {
                (SETTINGS[one.index].set)(&mut self.config, one.value.clone());
            }
            let quotas = &mut self.config.limits.quotas;
            quotas.named.push((tenant, std::mem::replace(&mut quotas.tenant, of_all)));
        }
    }
}

/// Every setting with its default, what it is for and what it may be: for `--help`.
pub fn describe_settings() -> String {
    let defaults = Loaded::default();
    let mut text = String::new();
    for setting in SETTINGS {
        let _ = writeln!(text, "  {} = {}", setting.key, defaults.shown(setting));
        let _ = writeln!(text, "      {}", setting.about);
        let rule = match setting.allowed {
            Allowed::LoopbackAddress => "must be IP:PORT on loopback".to_owned(),
            Allowed::LoopbackAddressOrOff => "must be IP:PORT on loopback, or off".to_owned(),
            allowed => allowed.to_string(),
        };
        let _ = writeln!(text, "      {rule}");
    }
    let _ = writeln!(
        text,
        "\n  {TENANT}.NAME.SETTING is {TENANTS}.SETTING for the tenant NAME alone. In a file:\n\
         \n      [{TENANT}.NAME]\n      requests_per_second = 5"
    );
    text
}
