"""The patterns of secrets that `secrets.scan` searches for.

The formats come from the rule sets of gitleaks (config/gitleaks.toml of July 2026) and detect-secrets
(1.5.0), or from the issuer's documentation; the last column names the source. If a prefix is unmistakable,
the surrounding characters do not matter, so that a token is found even within other text.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

# Before a format with which a word may end.
_START = r"(?<![A-Za-z0-9_-])"
_UUID = r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"
GITLEAKS, DETECT, ISSUER = "gitleaks", "detect-secrets", "issuer"


@dataclass(frozen=True)
class Rule:
    """A kind of secret.

    Args:
        kind: for people.
        hints: lower-case texts, one of which is in every match: without any of them, the pattern is not
            tried.
        pattern: its group 1 is the secret, or else the whole match.
        entropy: minimum Shannon entropy of the secret, in bits per character.
        source: of the format.
    """

    kind: str
    hints: tuple[str, ...]
    pattern: re.Pattern[str]
    entropy: float
    source: str


Row = tuple[str, str, str, float, str]  # kind, hints, pattern, minimum entropy, source

# Secrets that consist of one `TOKEN`: searched only in such tokens, which are rare in most texts.
TOKEN = re.compile(r"[A-Za-z0-9_./+=~:$%?&@-]{16,}")
_TOKENS: tuple[Row, ...] = (
    # Machine learning
    ("Hugging Face token", "hf_ api_org_", r"(?:hf_(?:oauth_)?|api_org_)[A-Za-z0-9]{30,}", 0, GITLEAKS),
    ("OpenAI key", "sk-", r"sk-(?:proj|svcacct|admin|None)-[A-Za-z0-9_-]{20,}", 0, GITLEAKS),
    ("OpenAI key", "t3blbkfj", r"sk-[A-Za-z0-9_-]{10,200}T3BlbkFJ[\w-]{16,}", 0, GITLEAKS),
    ("Anthropic key", "sk-ant-", r"sk-ant-[A-Za-z0-9_-]{20,}", 0, GITLEAKS),
    ("OpenRouter key", "sk-or-", r"sk-or-(?:v1-)?[0-9a-f]{40,}", 0, ISSUER),
    ("key of a model's service", "sk-", r"sk-[A-Za-z0-9]{40,}", 0, DETECT),
    # Shorter ones are ids after words such as task-, disk-, mask-.
    ("key of a model's service", "sk-", r"(?<!ta)(?<![dr]i)(?<![lm]a)(?<!de)sk-[A-Za-z0-9]{32,}", 0, DETECT),
    ("Groq key", "gsk_", r"gsk_[A-Za-z0-9]{40,}", 0, ISSUER),
    ("xAI key", "xai-", r"xai-[A-Za-z0-9]{60,}", 0, ISSUER),
    ("Perplexity key", "pplx-", r"pplx-[A-Za-z0-9]{40,}", 0, GITLEAKS),
    ("Replicate token", "r8_", r"r8_[A-Za-z0-9]{30,}", 0, ISSUER),
    ("NVIDIA key", "nvapi-", r"nvapi-[A-Za-z0-9_-]{50,}", 0, ISSUER),
    ("Together key", "tgp_v1_", r"tgp_v1_[A-Za-z0-9_-]{30,}", 0, ISSUER),
    ("Fireworks key", "fw_", _START + r"fw_[A-Za-z0-9]{20,}", 3, ISSUER),
    ("LangSmith key", "lsv2_", r"lsv2_(?:pt|sk)_[a-f0-9]{32}_[a-f0-9]{10}", 0, ISSUER),
    ("Pinecone key", "pcsk_", r"pcsk_[A-Za-z0-9_]{40,}", 0, ISSUER),
    ("Jina key", "jina_", r"jina_[A-Za-z0-9]{40,}", 0, ISSUER),
    ("Tavily key", "tvly-", r"tvly-[A-Za-z0-9-]{20,}", 0, ISSUER),
    ("ElevenLabs key", "sk_", r"sk_[a-f0-9]{48}", 0, ISSUER),
    ("Anyscale key", "esecret_", r"esecret_[A-Za-z0-9]{20,}", 0, ISSUER),
    ("RunPod key", "rpa_", r"rpa_[A-Z0-9]{40,}", 0, ISSUER),
    ("Weights & Biases key", "wandb_v1_", r"wandb_v1_[A-Za-z0-9_]{40,}", 0, ISSUER),
    ("Kaggle key", "kgat_", r"KGAT_[0-9a-f]{32}", 0, ISSUER),
    # Code, packages, build servers
    ("GitHub token", "ghp_ gho_ ghu_ ghs_ ghr_", r"gh[pousr]_[A-Za-z0-9]{36}", 0, GITLEAKS),
    ("GitHub token", "github_pat_", r"github_pat_[A-Za-z0-9_]{40,}", 0, GITLEAKS),
    (
        "GitLab token",
        "glpat- gldt- glft- glffct- glsoat- glrt- glcbt- glimt- glptt- glagent- gloas- glrtr- glwt-",
        r"gl(?:pat|dt|ft|ffct|soat|rt|rtr|cbt|imt|ptt|agent|oas|wt)-[A-Za-z0-9_.-]{20,}",
        0,
        GITLEAKS,
    ),
    ("GitLab token", "gr1348941", r"GR1348941[A-Za-z0-9_-]{20}", 0, GITLEAKS),
    ("GitLab session", "_gitlab_session=", r"_gitlab_session=([0-9a-z]{32})", 0, GITLEAKS),
    ("Atlassian token", "atatt3 atctt3 atbb", r"(?:ATATT3|ATCTT3|ATBB)[A-Za-z0-9_=-]{24,}", 0, GITLEAKS),
    ("PyPI token", "pypi-", r"pypi-[A-Za-z0-9_-]{50,}", 0, DETECT),
    ("npm token", "npm_", r"npm_[A-Za-z0-9]{36}", 0, GITLEAKS),
    ("RubyGems key", "rubygems_", r"rubygems_[a-f0-9]{48}", 0, GITLEAKS),
    ("NuGet key", "oy2", r"oy2[a-z0-9]{43}", 0, ISSUER),
    ("crates.io token", "cio", _START + r"cio[A-Za-z0-9]{32}", 3, ISSUER),
    ("Clojars token", "clojars_", r"CLOJARS_[a-z0-9]{60}", 0, GITLEAKS),
    ("Docker token", "dckr_", r"dckr_(?:pat|oat)_[A-Za-z0-9_-]{20,}", 0, ISSUER),
    ("CircleCI token", "ccipat_", r"CCIPAT_[A-Za-z0-9]{10,}_[a-f0-9]{40}", 0, ISSUER),
    ("Buildkite token", "bkua_", r"bkua_[a-f0-9]{40}", 0, ISSUER),
    ("SonarQube token", "squ_ sqp_ sqa_", r"sq[upa]_[a-f0-9]{40}", 0, GITLEAKS),
    ("Sourcegraph token", "sgp_", r"sgp_(?:(?:[a-fA-F0-9]{16}|local)_)?[a-fA-F0-9]{40}", 0, GITLEAKS),
    ("Artifactory key", "akc", r"AKC[A-Za-z0-9]{20,}", 3, DETECT),
    ("Artifactory key", "cmvmd", r"cmVmd[A-Za-z0-9]{59}", 3, GITLEAKS),
    ("Octopus key", "api-", _START + r"API-[A-Z0-9]{26}", 3, GITLEAKS),
    ("Harness key", "pat. sat.", r"(?:pat|sat)\.[\w-]{22}\.[0-9a-zA-Z]{24}\.[0-9a-zA-Z]{20}", 0, GITLEAKS),
    ("Pulumi token", "pul-", r"pul-[a-f0-9]{40}", 0, GITLEAKS),
    ("Terraform token", ".atlasv1.", r"[A-Za-z0-9]{14}\.atlasv1\.[A-Za-z0-9_=-]{60,}", 0, GITLEAKS),
    ("Postman key", "pmak-", r"PMAK-[A-Fa-f0-9]{24}-[A-Fa-f0-9]{34}", 0, GITLEAKS),
    # Clouds
    ("AWS key", "akia asia abia acca a3t", r"(?:A3T[A-Z0-9]|AKIA|ASIA|ABIA|ACCA)[A-Z0-9]{16}", 0, DETECT),
    ("AWS Bedrock key", "absk", r"ABSK[A-Za-z0-9+/]{109,}={0,2}", 0, GITLEAKS),
    ("AWS Bedrock key", "bedrock-api-key-", r"bedrock-api-key-[A-Za-z0-9+/=]{20,}", 0, GITLEAKS),
    ("AWS Marketplace token", "amzn.mws.", r"amzn\.mws\." + _UUID, 0, ISSUER),
    ("Google key", "aiza", r"AIza[A-Za-z0-9_-]{35}", 0, GITLEAKS),
    ("Google client secret", "gocspx-", r"GOCSPX-[A-Za-z0-9_-]{24,}", 0, ISSUER),
    ("Google access token", "ya29.", r"ya29\.[A-Za-z0-9_-]{20,}", 0, ISSUER),
    ("Google refresh token", "1//0", r"1//0[A-Za-z0-9_-]{40,}", 0, ISSUER),
    (
        "Azure key",
        "accountkey sharedaccesskey",
        r"(?:Account|SharedAccess)Key=([\w+/]{40,}={0,2})",
        0,
        DETECT,
    ),
    ("Azure client secret", "q~", r"[\w~.]{3}\dQ~[\w~.-]{31,34}", 3, GITLEAKS),
    ("Azure signature", "sig=", r"[?&]sig=([A-Za-z0-9%+/]{40,}(?:=|%3D)?)", 3, ISSUER),
    ("Alibaba key", "ltai", r"LTAI[A-Za-z0-9]{12,20}", 3, GITLEAKS),
    ("Tencent key", "akid", r"AKID[A-Za-z0-9]{32}", 3, ISSUER),
    ("Yandex key", "aqvn t1.", r"(?:AQVN[\w-]{35,38}|t1\.[\w-]{20,500}={0,2}\.[\w-]{86}={0,2})", 3, GITLEAKS),
    ("DigitalOcean token", "doo_v1_ dop_v1_ dor_v1_ dos_v1_", r"do[oprs]_v1_[a-f0-9]{64}", 0, GITLEAKS),
    ("Databricks token", "dapi", r"dapi[a-f0-9]{32}", 0, GITLEAKS),
    ("Heroku key", "hrku-", r"HRKU-[A-Za-z0-9_-]{36,}", 0, GITLEAKS),
    ("Netlify token", "nfp_", r"nfp_[A-Za-z0-9]{36,}", 0, ISSUER),
    ("Vercel token", "vcp_ vci_ vca_ vcr_ vck_", _START + r"vc[piark]_[A-Za-z0-9]{24,}", 3, ISSUER),
    ("Render key", "rnd_", _START + r"rnd_[A-Za-z0-9]{32}", 3, ISSUER),
    ("Fly token", "fo1_ fm1 fm2_", r"fo1_[\w-]{43}|fm(?:1[ar]|2)_[A-Za-z0-9+/]{100,}={0,3}", 0, GITLEAKS),
    ("Supabase key", "sbp_ sb_secret_", r"sbp_[a-f0-9]{40}|sb_secret_[A-Za-z0-9_-]{20,}", 0, ISSUER),
    ("PlanetScale token", "pscale_", r"pscale_(?:tkn|oauth|pw)_[\w.=-]{32,}", 0, GITLEAKS),
    ("Neon key", "napi_", r"napi_[a-z0-9]{40,}", 0, ISSUER),
    ("Cloudflare key", "v1.0-", r"v1\.0-[a-f0-9]{24}-[a-f0-9]{146}", 0, GITLEAKS),
    ("OpenShift token", "sha256~", r"sha256~[\w-]{43}", 3, GITLEAKS),
    ("Scalingo token", "tk-us-", r"tk-us-[\w-]{48}", 0, GITLEAKS),
    ("Tailscale key", "tskey-", r"tskey-[a-z]+-[A-Za-z0-9]{8,}-[A-Za-z0-9]{16,}", 0, ISSUER),
    ("Prefect key", "pnu_ pnb_", r"pn[ub]_[A-Za-z0-9]{36}", 0, GITLEAKS),
    # Secret managers
    ("Vault token", "hvs. hvb. hvr.", r"hv[sbr]\.[A-Za-z0-9_-]{20,}", 0, GITLEAKS),
    ("Doppler token", "dp.", r"dp\.(?:pt|st|ct|sa|scim|audit)\.[A-Za-z0-9._-]{40,}", 0, GITLEAKS),
    ("1Password token", "ops_eyj", r"ops_eyJ[A-Za-z0-9+/]{100,}={0,3}", 0, GITLEAKS),
    ("1Password key", "a3-", r"A3-[A-Z0-9]{6}-[A-Z0-9]{6}-?[A-Z0-9]{5}(?:-[A-Z0-9]{5}){3}", 0, GITLEAKS),
    ("age key", "age-secret-key-1", r"AGE-SECRET-KEY-1[A-Z0-9]{58}", 0, GITLEAKS),
    ("Infracost key", "ico-", _START + r"ico-[A-Za-z0-9]{32}", 3, GITLEAKS),
    ("JSON web token", "eyj", r"eyJ[\w-]{10,2000}\.eyJ[\w-]{10,9000}\.[\w-]{10,}", 0, GITLEAKS),
    # Messages, mail, telephone
    ("Slack token", "xox", r"xox[abcdeoprs]-[A-Za-z0-9%-]{10,}", 0, DETECT),
    ("Slack token", "xapp- xoxe.", r"(?:xapp-\d-|xoxe\.xox[bp]-\d-)[A-Za-z0-9-]{20,}", 0, GITLEAKS),
    (
        "Slack webhook",
        "hooks.slack.com",
        r"hooks\.slack\.com/(?:services|workflows|triggers)/[\w/]{20,}",
        0,
        GITLEAKS,
    ),
    ("Discord webhook", "/api/webhooks/", r"discord(?:app)?\.com/api/webhooks/\d{15,}/[\w-]{50,}", 0, ISSUER),
    ("Discord token", ".", r"[MNO](?=[\w-]*\d)[\w-]{23,27}\.[\w-]{6}\.[\w-]{27,38}", 4, DETECT),
    ("Zapier webhook", "hooks.zapier.com", r"hooks\.zapier\.com/hooks/catch/\d+/\w+", 0, ISSUER),
    ("Telegram token", ":aa", r"(?<!\d)\d{8,10}:AA[A-Za-z0-9_-]{33}", 0, DETECT),
    ("Twilio key", "sk ac", r"(?:SK|AC)[0-9a-f]{32}(?![0-9a-f])", 2, DETECT),
    ("SendGrid key", "sg.", r"SG\.[A-Za-z0-9_-]{16,32}\.[A-Za-z0-9_-]{16,64}", 0, DETECT),
    ("Mailgun key", "key-", r"(?:pub)?key-[0-9a-f]{32}", 0, GITLEAKS),
    ("Mailchimp key", "-us", r"[0-9a-f]{32}-us\d{1,2}(?!\d)", 0, DETECT),
    ("Brevo key", "xkeysib- xsmtpsib-", r"x(?:key|smtp)sib-[a-f0-9]{64}-[A-Za-z0-9]{16}", 0, GITLEAKS),
    # Money, shops, advertising
    ("Stripe key", "k_live_ k_test_ k_prod_", r"[sr]k_(?:live|test|prod)_[A-Za-z0-9]{10,}", 0, GITLEAKS),
    ("webhook secret", "whsec_", r"whsec_[A-Za-z0-9+/=]{24,}", 0, ISSUER),
    ("Square token", "sq0", r"sq0[a-z]{3}-[A-Za-z0-9_-]{22,}", 0, GITLEAKS),
    ("Square token", "eaaa", _START + r"EAAA[A-Za-z0-9_-]{60}(?![A-Za-z0-9_-])", 3, GITLEAKS),
    ("PayPal token", "access_token$", r"access_token\$\w{4,12}\$[0-9a-z]{16}\$[0-9a-f]{32}", 0, ISSUER),
    ("Plaid token", "access-", r"access-(?:sandbox|development|production)-" + _UUID, 0, GITLEAKS),
    ("Razorpay key", "rzp_", r"rzp_(?:live|test)_[A-Za-z0-9]{14}", 0, ISSUER),
    ("Shopify token", "shpat_ shpca_ shppa_ shpss_", r"shp(?:at|ca|pa|ss)_[A-Fa-f0-9]{32}", 0, GITLEAKS),
    ("Flutterwave key", "flwseck flwpubk", r"FLW(?:SECK|PUBK)(?:_TEST)?-[A-Za-z0-9-]{12,}", 0, GITLEAKS),
    ("EasyPost key", "ezak eztk", r"EZ[AT]K[A-Za-z0-9]{54}", 0, GITLEAKS),
    ("Shippo key", "shippo_", r"shippo_(?:live|test)_[A-Fa-f0-9]{40}", 0, GITLEAKS),
    ("Duffel key", "duffel_", r"duffel_(?:test|live)_[A-Za-z0-9_=-]{43}", 0, GITLEAKS),
    ("Facebook token", "eaa", r"EAA[A-Za-z0-9]{90,}", 3, GITLEAKS),
    ("Instagram token", "igq", r"IGQ[\w-]{100,}", 3, ISSUER),
    ("X token", "aaaaaaaaaaaaaaaaaaaa", r"A{20,22}[A-Za-z0-9%]{60,}", 3, GITLEAKS),
    ("HubSpot token", "pat-na eu1 pat-eu", r"pat-(?:na|eu|ap)\d-" + _UUID, 0, ISSUER),
    # Notes, designs, tickets
    ("Notion token", "ntn_ secret_", r"(?:ntn|secret)_[A-Za-z0-9]{40,}", 3, GITLEAKS),
    ("Linear key", "lin_api_ lin_oauth_", r"lin_(?:api|oauth)_[A-Za-z0-9]{32,}", 0, GITLEAKS),
    ("Airtable token", "pat", r"pat[A-Za-z0-9]{14}\.[a-f0-9]{64}", 0, GITLEAKS),
    ("Figma token", "figd_ figo_ figu_", r"fig[dou]r?_[A-Za-z0-9_-]{40,}", 0, ISSUER),
    ("Asana token", "/", r"(?<!\d)[012]/\d{13,}(?:/\d{13,})?:[0-9a-f]{32}", 0, ISSUER),
    ("ClickUp token", "pk_", _START + r"pk_\d{6,}_[A-Z0-9]{32}", 0, ISSUER),
    ("Dropbox token", "sl.", r"sl\.(?:u\.)?[A-Za-z0-9_-]{120,}", 3, GITLEAKS),
    ("Typeform token", "tfp_", r"tfp_[\w.=-]{40,}", 0, GITLEAKS),
    ("Contentful token", "cfpat-", r"CFPAT-[\w-]{40,}", 0, ISSUER),
    ("Frame.io token", "fio-u-", r"fio-u-[\w=-]{64}", 0, GITLEAKS),
    ("ReadMe key", "rdme_", r"rdme_[a-z0-9]{70}", 0, GITLEAKS),
    ("Mapbox token", "sk.eyj", r"sk\.eyJ[\w-]{30,500}\.[\w-]{20,}", 0, GITLEAKS),
    ("MaxMind key", "_mmk", r"[A-Za-z0-9]{6}_[A-Za-z0-9]{29}_mmk", 0, GITLEAKS),
    # Measurements
    (
        "Grafana token",
        "glc_ glsa_ eyjrijoi",
        r"glc_[\w+/]{32,}|glsa_\w{32}_[A-Fa-f0-9]{8}|eyJrIjoi[\w+/]{70,}",
        0,
        GITLEAKS,
    ),
    ("New Relic key", "nrak- nrjs- nrii- nrra-", r"NR(?:AK|JS|II|RA)-[A-Za-z0-9-]{19,}", 0, GITLEAKS),
    ("Sentry token", "sntrys_ sntryu_", r"sntr(?:ys|yu)_[A-Za-z0-9+/=_]{40,}", 0, GITLEAKS),
    ("PostHog key", "phc_ phx_", r"ph[cx]_[A-Za-z0-9]{40,}", 0, ISSUER),
    ("Dynatrace token", "dt0", r"dt0[a-z]\d\d\.[A-Z0-9]{24}\.[A-Z0-9]{64}", 0, GITLEAKS),
    ("LaunchDarkly key", "api- sdk-", _START + r"(?:api|sdk)-" + _UUID, 0, ISSUER),
)
# Secrets recognized by the words around them.
_CONTEXTS: tuple[Row, ...] = (
    (
        "Weights & Biases key",
        "wandb weights",
        r"(?i:wandb|weights.?(?:and|&).?biases)[^\n]{0,60}?(?<![0-9a-f])([0-9a-f]{40})(?![0-9a-f])",
        0,
        ISSUER,
    ),
    ("Kaggle key", '"key"', r'"username"[^\n{}]{1,80}"key"\s*:\s*"([0-9a-f]{32})"', 0, ISSUER),
    (
        "npm password",
        "_auth _password",
        r"(?m)(?:^|:)_(?:authToken|auth|password)\s*=\s*([^\s$]{8,})",
        0,
        DETECT,
    ),
    ("Docker login", '"auth"', r'"auth"\s*:\s*"([A-Za-z0-9+/]{12,}={0,2})"', 2.5, ISSUER),
    ("private key", "private key", r"-{4,5} ?BEGIN [A-Z0-9 ]{0,60}PRIVATE KEY", 0, DETECT),
    ("private key", "putty-user-key-file", r"PuTTY-User-Key-File-\d", 0, DETECT),
    ("private key", '"kty"', r'"kty"[^{}]{0,3000}?"d"\s*:\s*"([A-Za-z0-9_-]{40,})"', 3, ISSUER),
    ("private key", "privatekey", r"(?m)^\s*PrivateKey\s*=\s*([A-Za-z0-9+/]{43}=)", 0, ISSUER),
    ("Teams webhook", "webhook.office.com", r"webhook\.office\.com/webhookb2/[^\s\"']{80,}", 0, GITLEAKS),
    ("Sentry address", "ingest", r"https://([0-9a-f]{32})(?::[0-9a-f]{32})?@[\w.-]+/\d+", 0, ISSUER),
    (
        "password in an address",
        "://",
        r"[a-z][a-z0-9+.-]{1,30}://[^\s/:@\"'<>`\\]{0,100}:([^\s/:@\"'<>`\\{}$]{4,200})@[\w\[]",
        0,
        DETECT,
    ),
    (
        "password in a header",
        "authorization",
        r"(?i)authorization[\"']?\s{0,3}[:=,]\s{0,3}[\"']?(?:basic|bearer|token)\s+([A-Za-z0-9+/._~=-]{16,})",
        3,
        GITLEAKS,
    ),
    (
        "password of a command",
        "curl wget",
        r"(?:curl|wget)\b[^\n]{0,300}?\s-(?:u|-user|-password)[ =]?[\"']?([^\s:\"'$]{1,60}:[^\s\"'$]{4,})",
        0,
        GITLEAKS,
    ),
    ("password of a login", "machine", r"machine\s+\S+\s+login\s+\S+\s+password\s+(\S{4,})", 0, ISSUER),
    ("password of a database", ":5432:", r"(?m)^[^\s:]+:5432:[^\s:]*:[^\s:]+:([^\s:]{4,})$", 0, ISSUER),
    (
        "password of a database",
        "pwd= password=",
        r"(?i)(?:server|source|host|user id|uid)=[^;\n]{1,100};[^\n]{0,200}?(?:password|pwd)=([^;\s\"']{4,})",
        0,
        ISSUER,
    ),
    (
        "stored password",
        "$1$ $2a$ $2b$ $2y$ $5$ $6$ $y$ $apr1$ $argon2",
        r"\$(?:1|2[aby]|5|6|y|apr1|argon2id?)\$[A-Za-z0-9./$,=]{20,}",
        3,
        ISSUER,
    ),
    (
        "secret of Kubernetes",
        "secret",
        r"kind:\s*[\"']?Secret\b[^\0]{0,600}?\s(?:string)?[dD]ata:\s+[\w.-]+:\s*[\"']?([A-Za-z0-9+/=]{8,})",
        0,
        GITLEAKS,
    ),
)


def _rules(table: tuple[Row, ...]) -> tuple[Rule, ...]:
    return tuple(
        Rule(kind, tuple(hints.split(" ")), re.compile(pattern, re.ASCII), entropy, source)
        for kind, hints, pattern, entropy, source in table
    )


TOKENS, CONTEXTS = _rules(_TOKENS), _rules(_CONTEXTS)

# A value assigned to a name. `secrets.is_random` decides whether it is random enough to be a secret.
_NAMES = (
    r"api[_.-]?key|api[_.-]?secret|apikey|access[_.-]?key|secret(?!s)|token(?!iz)|passw(?:or)?d|passphrase|pwd|"
    r"credential|auth[_.-]?key|private[_.-]?key|encryption[_.-]?key|signing[_.-]?key|account[_.-]?key|"
    r"service[_.-]?key|client[_.-]?key|deploy[_.-]?key|session[_.-]?key|master[_.-]?key|db[_.-]?pass|"
    r"conn(?:ection)?[_.-]?str(?:ing)?"
)
# Services whose keys have no format of their own.
_SERVICES = (
    r"adafruit|adobe|airtable|algolia|alibaba|asana|assemblyai|azure|beamer|bitbucket|bittrex|cloudflare|"
    r"codecov|cohere|coinbase|comet|confluent|contentful|datadog|deepgram|deepseek|discord|droneci|dropbox|"
    r"etsy|fastly|finicity|finnhub|flickr|freshbooks|gitter|gocardless|heroku|hubspot|ibm|intercom|jfrog|"
    r"kraken|kucoin|launchdarkly|linkedin|linode|lob|looker|mailjet|mapbox|mattermost|meraki|messagebird|"
    r"mistral|neptune|netlify|newrelic|ngrok|nytimes|okta|plaid|postmark|railway|rapidapi|sendbird|sentry|"
    r"snyk|softlayer|sonar|squarespace|sumologic|together|travis|twitch|twitter|voyage|zendesk|zhipu"
)
# An assigned value, and the name before it.
VALUE = re.compile(r"(?:=>|:=|=|:)[ \t]{0,4}(?P<quote>[\"'`]?)(?P<value>[^\s\"'`,;<>(){}\[\]\\]{6,300})")
NAME_BEFORE = re.compile(
    rf"(?i)(?P<name>(?:{_NAMES}|(?<![a-z])(?:{_SERVICES})(?=[_.-]|\w{{0,8}}(?:key|id|secret|token)))[\w.-]{{0,30}})"
    r"[\"'\]]{0,2}[ \t]{0,4}$",
    re.ASCII,
)
LONGEST_NAME = 80

# File names, in lower case, of files that contain secrets.
NAMES = re.compile(
    r"\.env(\..+)?|.+\.env|\.?envrc|[._]netrc|netrc|id_(rsa|dsa|ecdsa|ed25519)(_sk)?|.+_(rsa|ed25519)|"
    r".+\.(pem|key|p8|p12|pfx|pkcs12|kdbx?|jks|keystore|bks|ppk|ovpn|tfvars|tfstate|kubeconfig|"
    r"keychain|agilekeychain|psafe3)|"
    r"\.(npmrc|pypirc|git-credentials|pgpass|my\.cnf|htpasswd|dockercfg|dockerconfigjson|s3cfg|boto|"
    r"vault-token|vault_pass(\.txt)?|terraformrc|bash_history|zsh_history|python_history|psql_history|"
    r"mysql_history|node_repl_history|ftpconfig|remote-sync\.json|passwd|credentials)|"
    r"kubeconfig|credentials(\.(json|xml|ya?ml|ini|csv|toml))?|client_secrets?.*\.json|service[-_]?account.*\.json|"
    r"kaggle\.json|secrets?\.(json|ya?ml|toml|ini|env|txt)|shadow|rclone\.conf|wp-config\.php|token"
)
