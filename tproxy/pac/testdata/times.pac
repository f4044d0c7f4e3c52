function FindProxyForURL(url, host) {
    if (host == "week.example" && weekdayRange("SUN", "SAT")) return "PROXY always:1";
    if (host == "gmt.example" && weekdayRange("SUN", "SAT", "GMT")) return "PROXY gmt:1";
    if (host == "day.example" && timeRange(0, 0, 0, 23, 59, 59)) return "PROXY day:1";
    if (host == "year.example" && dateRange("JAN", "DEC") && dateRange(1, 31)) return "PROXY year:1";
    if (host == "past.example" && dateRange(1, "JAN", 1999, 31, "DEC", 1999)) return "PROXY past:1";
    if (host == "wrong.example" && (weekdayRange("MONDAY") || timeRange("noon") || dateRange())) return "PROXY wrong:1";
    return "DIRECT";
}
